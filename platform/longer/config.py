"""Every job's settings: one frozen tree, read from YAML, any field overridable on the command line.

Precedence: command line, then the YAML file, then the defaults here. Each mistake becomes one line (`load_settings`).
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from longer.batch_settings import BatchSettings, ExportSettings
from longer.encoder_settings import Sim
from longer.errors import UserError, meant
from longer.flags import Flags
from longer.model_settings import ModelSettings
from longer.schema import EventSchema
from longer.section import Section, WorkersPath
from longer.settings_file import read_yaml
from longer.table_settings import (
    GenerateSettings,
    ImportSettings,
    ImpressionSettings,
    RequestSettings,
    SequenceSettings,
    VerifySettings,
)
from longer.training_settings import EvaluateSettings, TrainSettings

_ALL = 1 << 40
"""More events than a user has."""

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Name of an environment variable that `ray job submit` sets for a job."""


class ServeSettings(Section):
    """Ray Serve and the replica's cache of user states."""

    host: str = Field(
        "127.0.0.1",
        description="Address that the HTTP proxy, and replicas themselves, bind; anything but loopback is your decision.",
    )
    port: int = Field(8321, ge=1, le=65535, description="Port of the HTTP proxy.")
    num_replicas: int = Field(1, ge=1, description="Replicas at the start.")
    max_replicas: int = Field(2, ge=1, description="Replicas that autoscaling may reach.")
    cache_bytes: int = Field(
        256 << 20,
        ge=0,
        description="Budget of a replica's user states, in bytes; room for the states of one batch stands beside it.",
    )
    max_candidates: int = Field(2_000, ge=1, description="Most candidates of one request.")
    max_batch_requests: int = Field(16, ge=1, description="Requests scored together.")
    check_requests: int = Field(400, ge=1, description="Test requests that the quickstart sends.")


class RaySettings(Section):
    """Which Ray the jobs run on."""

    address: str | None = Field(
        None,
        description="A running cluster's address or 'auto'; null: RAY_ADDRESS of the environment, or else a Ray of the job's own.",
    )
    num_cpus: int = Field(
        4, ge=1, description="Logical CPUs of a local Ray; more than cores lets light actors share them."
    )
    object_store_bytes: int = Field(1 << 30, ge=80 << 20, description="Shared memory of a local Ray, in bytes.")
    scratch: WorkersPath | None = Field(
        None,
        description="Folder on each node's disk, no tmpfs, for a run's requests while it trains; null: Ray's temporary folder.",
    )
    pool_label: str | None = Field(
        None,
        description="Label whose value on each node is 'gpu' or 'cpu': work that asks for GPUs then runs on the first only, all "
        "else on the second only; null: anywhere.",
    )

    @property
    def cluster(self) -> str | None:
        """The running cluster's address, which `ray job submit` tells by RAY_ADDRESS; None: a local Ray is started."""
        return self.address or os.environ.get("RAY_ADDRESS")

    def place(self, num_gpus: float) -> dict[str, str]:
        """Ray's `label_selector` of a task or actor that asks for so many GPUs."""
        return {self.pool_label: "gpu" if num_gpus else "cpu"} if self.pool_label else {}

    def options(self, num_cpus: float, num_gpus: float = 0) -> dict[str, Any]:
        """Ray's options of a task or actor that asks for so much, `label_selector` included."""
        gpus = {"num_gpus": num_gpus} if num_gpus else {}
        return {"num_cpus": num_cpus, **gpus, "label_selector": self.place(num_gpus)}


class Settings(BaseSettings):
    """The whole platform's settings; each job reads its own section and those before it."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_kebab_case=False,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=False,
    )

    root: str = Field(
        "runs/default",
        min_length=1,
        validate_default=True,
        description="Folder or s3:// prefix that holds the tables, checkpoints and reports.",
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="Seed of generated logs, negatives, initial weights and the order of training."
    )
    event_schema: EventSchema = Field(EventSchema(), description="Columns of the event log and which are features.")
    import_events: ImportSettings = Field(ImportSettings(), description="jobs.import_events")
    import_impressions: ImpressionSettings = Field(ImpressionSettings(), description="jobs.import_impressions")
    generate: GenerateSettings = Field(GenerateSettings(), description="jobs.generate_events")
    sequences: SequenceSettings = Field(SequenceSettings(), description="jobs.build_sequences")
    requests: RequestSettings = Field(RequestSettings(), description="jobs.build_requests")
    model: ModelSettings = Field(ModelSettings(), description="The model's sizes.")
    train: TrainSettings = Field(TrainSettings(), description="jobs.train")
    evaluate: EvaluateSettings = Field(EvaluateSettings(), description="jobs.evaluate")
    serve: ServeSettings = Field(ServeSettings(), description="jobs.serve and serve_apps.scoring")
    batch_score: BatchSettings = Field(BatchSettings(), description="jobs.batch_score")
    export_embeddings: ExportSettings = Field(ExportSettings(), description="jobs.export_embeddings")
    verify: VerifySettings = Field(VerifySettings(), description="jobs.verify")
    ray: RaySettings = Field(RaySettings(), description="Where the jobs run.")

    @field_validator("root")
    @classmethod
    def _same_for_workers(cls, root: str) -> str:
        """Ray's workers run in folders of their own, where a relative path would lead elsewhere."""
        if "://" in root or os.path.isabs(root):
            return root
        if SUBMITTED in os.environ:
            raise ValueError(
                "a submitted job runs in a folder of Ray's, which is lost with all beside it: use s3://, or an absolute path "
                "that every node sees"
            )
        return os.path.abspath(root)

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        schema = self.event_schema
        self.import_events.check_columns(schema.events_arrow().names, _features(schema, "item", "event"))
        if self.import_impressions.source:
            shown = schema.of_impressions(self.import_impressions.group_id)
            asked = self.import_impressions.as_import()
            asked.check_columns(shown.events_arrow().names, _features(schema, "item", "request"))
        names = [task.name for task in self.train.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"train.tasks={names} names a task twice: name each once")
        unknown = {task.name for task in self.train.tasks} - set(self.event_schema.tasks)
        if unknown:
            raise ValueError(
                f"train.tasks names {sorted(unknown)}, which event_schema.tasks lacks: add the label column or drop the task"
            )
        sim = self.model.encoder
        if isinstance(sim, Sim) and sim.search == "hard":
            known = self.event_schema.features_of("item", "categorical")
            if sim.field not in known:
                raise ValueError(
                    f"model.encoder.field={sim.field}: event_schema has no categorical item feature of that name (it has "
                    f"{', '.join(known) or 'none'}): name one, or set search to soft"
                )
        needed = self.model.windows.max_history_events
        if self.sequences.keep_events < needed:
            raise ValueError(
                f"sequences.keep_events={self.sequences.keep_events} is less than a full history window plus a stride, "
                f"{needed} events: raise keep_events or lower model.history_events"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    def of_impressions(self, num_buckets: int) -> "Settings":
        """Settings with which the jobs that import events and build sequences do the same with impressions, under an own root.

        All of a user's impressions are kept, in as many buckets as the histories.
        """
        asked = self.import_impressions
        kept = {"num_buckets": num_buckets, "keep_events": _ALL}
        return self.model_copy(
            update={
                "root": self.path("impressions"),
                "event_schema": self.event_schema.of_impressions(asked.group_id),
                "import_events": asked.as_import(),
                "sequences": self.sequences.model_copy(update=kept),
            }
        )

    def path(self, *parts: str) -> str:
        """A path under `root`, local or s3://."""
        return "/".join([self.root.rstrip("/"), *parts])


def load_settings(
    config: str | None = None, overrides: dict[str, Any] | None = None, short_flags: Mapping[str, str] | None = None
) -> Settings:
    """Settings from a YAML file and nested overrides. Raises UserError, one line a mistake, naming the field and the remedy.

    With `short_flags`, of the settings that may be given without their section, the overrides are a command line's: mistakes name
    its flags.
    """
    try:
        return Settings(**_merged(read_yaml(config) if config else {}, overrides or {}))
    except ValidationError as error:
        flags = None if short_flags is None else Flags(overrides or {}, short_flags, {*_names(Settings)})
        raise UserError(_explain(error, config, flags)) from None


def _features(schema: EventSchema, *kinds: str) -> list[str]:
    return [feature.name for feature in schema.features if feature.of in kinds]


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in top.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def _names(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every setting by its dotted name, sections too."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation, f"{prefix}{name}.")


def see_help(setting: str) -> str:
    """Where a user who got this setting's name wrong finds the right one."""
    section = setting.partition(".")[0]
    return f"see --help {section}" if "." in setting and section in Settings.model_fields else "see --help"


def _explain(error: ValidationError, config: str | None, flags: Flags | None) -> str:
    """One line a mistake: where, what, and what is allowed."""
    lines = []
    for mistake in error.errors():
        field = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            message = f"unknown setting: {meant(field, _names(Settings))}{see_help(field)}"
        else:
            message = mistake["msg"].removeprefix("Value error, ")
            message += f" (got {mistake['input']!r})" if not isinstance(mistake["input"], dict | BaseModel) else ""
        where = [config] if config else []
        if flags:
            given, alone = flags.where(field, message)
            where = given if alone else where + given
            if given and (missing := flags.missing(field, message)):
                message += f" ({', '.join(missing)})"
        told = field if f"--{field}" not in where else ""
        lines.append(": ".join(part for part in (", ".join(where), told, message) if part))
    return "\n".join(lines)
