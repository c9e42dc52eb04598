"""What an offline run is asked and what decides its content: versions of model and tables, users, items, and the moment."""

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal

from longer.batch_settings import BatchSettings, UserSettings
from longer.config import Settings
from longer.data.events import epoch_ms, iso_ms, iso_time
from longer.data.id_lists import IdList
from longer.data.items import items_version
from longer.data.layout import bucket_of_path
from longer.data.records import SCRATCH
from longer.data.tables import open_version
from longer.errors import UserError
from longer.schema import EventSchema
from longer.storage import TABLE_FORMAT, DataFile, Table, Version, fingerprint
from longer.training.checkpoints import load_appendable, load_model
from longer.training.inputs import Inputs, served_checkpoint

Kind = Literal["requests", "lists", "top_k", "vectors"]
_TABLES: dict[Kind, str] = {
    "requests": "batch_scores",
    "lists": "candidate_scores",
    "top_k": "top_items",
    "vectors": "user_vectors",
}
"""Under the root, one table a kind of question: their rows differ."""

_ALL = "all"


@dataclass(frozen=True)
class Plan:
    """One run, as its actors need it. `inputs` are the versions and digests of all that is read."""

    kind: Kind
    schema: EventSchema
    root: str
    checkpoint: Version
    sequences: Version
    inputs: dict[str, str]
    requests: Version | None = None
    split: str | None = None
    request_ts: int | None = None
    users: IdList | None = None
    candidates: IdList | None = None
    top_k: int | None = None
    check_requests: int = 0
    batch_bytes: int = 0
    most_actors: int = 1
    precision: Literal["float32", "bf16"] = "float32"
    device: str = "cpu"
    device_share: float = 1.0
    """Of a device, that an actor has: a CPU, a GPU, or a part of one."""

    @property
    def section(self) -> str:
        """Of the settings that ask this."""
        return "export_embeddings" if self.kind == "vectors" else "batch_score"

    @property
    def table_path(self) -> str:
        return f"{self.root}/{_TABLES[self.kind]}"

    @property
    def content(self) -> dict[str, Any]:
        """What decides the rows, apart from the inputs."""
        ts = None if self.request_ts is None else iso_time(self.request_ts)
        precision = None if self.precision == "float32" else self.precision
        chosen = {"split": self.split, "request_ts": ts, "top_k": self.top_k, "precision": precision}
        return {"kind": self.kind, **{name: value for name, value in chosen.items() if value is not None}}

    @cached_property
    def version_id(self) -> str:
        return fingerprint("offline", TABLE_FORMAT, self.content, self.inputs)

    @property
    def asked(self) -> str:
        """What is asked, as mistakes name it."""
        if self.requests is None:
            return "users at this request_ts"
        return "requests" if self.split == _ALL else f"{self.split} requests"

    @cached_property
    def request_files(self) -> dict[int, list[DataFile]]:
        """Files of the requests that are asked, by bucket; each ascends by user and time, and later ones have later requests."""
        assert self.requests
        assert self.split
        files = dict[int, list[DataFile]]()
        for split in _splits(self.requests, self.split):
            for file in self.requests.data_files():
                if file.path.startswith(f"split={split}/"):
                    files.setdefault(bucket_of_path(file.path), []).append(file)
        return files

    @property
    def mark(self) -> str:
        """A file in an unfinished version that says of which model and table it is: its question may be asked again until there
        are others."""
        return f"{SCRATCH}/of-{self.checkpoint.id}-{self.sequences.id}"

    @property
    def catalogue_path(self) -> str:
        return f"{self.root}/tables/items"

    @property
    def items_path(self) -> str | None:
        """The item catalogue, if it says more of items than their ids."""
        return self.catalogue_path if self.schema.features_of("item") else None

    @property
    def manifest(self) -> dict[str, Any]:
        return {
            "schema_hash": self.schema.hash(),
            "inputs": self.inputs,
            "model_version": self.checkpoint.manifest["model_version"],
            "settings": self.content,
            **({"split": self.split} if self.split else {}),
        }


def plan_scores(settings: Settings) -> Plan:
    """What `batch_score` asks; a UserError names a table, file or split that is not there, or tables that do not fit."""
    asked, schema = settings.batch_score, settings.event_schema
    if asked.of_users:
        return _plan_users(settings, asked, "top_k" if asked.top_k else "lists")
    named = _named_requests(settings, asked.requests_table) if asked.requests_table else None
    inputs = Inputs.served(settings, named)
    sizes = inputs.requests.manifest["num_requests"]
    if not sum(sizes.get(split, 0) for split in _splits(inputs.requests, asked.split)):
        raise UserError(
            f"batch_score.split={asked.split}: no requests in it: choose one of {', '.join(sizes)} that has some, or {_ALL}"
        )
    return Plan(
        kind="requests",
        schema=schema,
        root=settings.path(),
        checkpoint=inputs.checkpoint,
        sequences=inputs.sequences,
        inputs=inputs.ids,
        requests=inputs.requests,
        split=asked.split,
        check_requests=asked.check_requests,
        batch_bytes=asked.batch_bytes,
        most_actors=asked.concurrency[1],
        precision=asked.precision,
        device=asked.device,
        device_share=asked.num_gpus_per_scorer or 1.0,
    )


def _splits(requests: Version, split: str) -> list[str]:
    """In the order of their times."""
    return list(requests.manifest["num_requests"]) if split == _ALL else [split]


def _named_requests(settings: Settings, path: str) -> Version:
    """The version that a table of requests serves, or the one whose folder this is; a UserError if it does not fit the root."""
    table_path, _, version_id = path.rpartition("/")
    named = Table(path).current() or Table(table_path).find(version_id)
    if named is None or not isinstance(named.manifest.get("num_requests"), dict):
        raise UserError(
            f"batch_score.requests_table={path}: no published request table: name a folder that jobs.build_requests has "
            "written, such as ROOT/tables/requests"
        )
    open_version(named.table_path, settings.event_schema, named.id, "jobs.build_requests")
    made_from, sequences = named.manifest["inputs"]["sequences"], settings.path("tables", "sequences")
    if Table(sequences).find(made_from) is None:
        raise UserError(
            f"batch_score.requests_table={path}: made from version {made_from} of the sequences, which {sequences} does not "
            "have: name requests that were made from one of its versions"
        )
    return named


def plan_vectors(settings: Settings) -> Plan:
    """What `export_embeddings` asks."""
    return _plan_users(settings, settings.export_embeddings, "vectors")


def check_model(plan: Plan) -> None:
    """A UserError if the plan's checkpoint cannot answer it: told once here, not by every actor."""
    load, path = load_model if plan.kind == "requests" else load_appendable, plan.checkpoint.path
    info = load(path, expected_schema=plan.schema)[1]
    if plan.kind == "vectors" and not info.model.num_self_layers:
        raise UserError(
            f"{path}/model.json: model.num_self_layers=0: the user's token of such a model is never read after it has seen "
            "the history: train one with self layers"
        )
    if plan.kind == "vectors" and not info.model.num_user_tokens:
        raise UserError(
            f"{path}/model.json: model.num_user_tokens=0: such a model has no token of a user: train one with 1"
        )


def check_named(settings: Settings, asked: UserSettings) -> None:
    """A UserError if there is no checkpoint, or no file where ids are named; none is read."""
    served_checkpoint(settings)
    for ids in _named_ids(settings.event_schema, asked).values():
        _ = ids.files


def _named_ids(schema: EventSchema, asked: UserSettings) -> dict[str, IdList]:
    """Files of users and of candidates, where there are such."""
    user_type, item_type = schema.id_types
    named = {}
    if asked.users:
        section = "batch_score" if isinstance(asked, BatchSettings) else "export_embeddings"
        named["users"] = IdList(asked.users, "user_id", user_type, f"{section}.users")
    if isinstance(asked, BatchSettings) and asked.candidates:
        named["candidates"] = IdList(asked.candidates, "item_id", item_type, "batch_score.candidates")
    return named


def _plan_users(settings: Settings, asked: UserSettings, kind: Kind) -> Plan:
    schema, checkpoint = settings.event_schema, served_checkpoint(settings)
    sequences = open_version(settings.path("tables", "sequences"), schema, None, "jobs.build_sequences")
    named = _named_ids(schema, asked)
    inputs = {"checkpoint": checkpoint.id, "sequences": sequences.id}
    inputs |= {name: ids.digest() for name, ids in named.items()}
    if isinstance(asked, BatchSettings) and (asked.catalogue or schema.features_of("item")):
        inputs |= {"items": items_version(sequences.id, schema)}
        open_version(settings.path("tables", "items"), schema, inputs["items"], "jobs.build_sequences")
    return Plan(
        kind=kind,
        schema=schema,
        root=settings.path(),
        checkpoint=checkpoint,
        sequences=sequences,
        inputs=inputs,
        request_ts=_moment(asked, sequences),
        users=named.get("users"),
        candidates=named.get("candidates"),
        top_k=asked.top_k if isinstance(asked, BatchSettings) else None,
        check_requests=asked.check_requests,
        batch_bytes=asked.batch_bytes,
        most_actors=asked.concurrency[1],
        precision=asked.precision if isinstance(asked, BatchSettings) else "float32",
        device=asked.device,
        device_share=asked.num_gpus_per_scorer or 1.0,
    )


def _moment(asked: UserSettings, sequences: Version) -> int:
    """In milliseconds, as events are: the settings', rounded up so that no event before it is lost, or after the newest event."""
    if asked.request_ts:
        return epoch_ms(asked.request_ts + timedelta(microseconds=999))
    return iso_ms(sequences.manifest["watermark"]) + 1
