"""Checkpoints that cannot run code: safetensors for tensors, JSON for the rest, on local disk or S3.

model.safetensors      weights
model.json             format, model version, schema, model settings, tasks: all that serving needs
trainer.safetensors    the optimizer's moments, float32
trainer.json           the position in the data, the history so far, what has been trained in each epoch, checkpoints before

Random numbers need no state: those of a step are a function of seed, step and worker.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, cast

import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError

from longer.config import Settings
from longer.encoder_settings import UserEmbedding
from longer.errors import UserError
from longer.model.encoders.factory import make_model, upstream_settings
from longer.model.encoders.ranker import EncoderRanker
from longer.model.longer import Longer
from longer.model.ranker import Ranker
from longer.model_settings import ModelSettings
from longer.schema import EventSchema
from longer.storage import read_bytes, write_bytes
from longer.training.cursor import Position
from longer.training_settings import TaskSettings

FORMAT_VERSION = 3
"""Of model.json and model.safetensors."""

TRAINER_VERSION = 3
"""Of trainer.json and trainer.safetensors. Part of a run's id: a run of another format is another run."""

_TASKS: TypeAdapter[tuple[TaskSettings, ...]] = TypeAdapter(tuple[TaskSettings, ...])


@dataclass(frozen=True)
class CheckpointInfo:
    """What a model is, apart from its weights."""

    path: str
    model_version: str
    model: ModelSettings
    schema: EventSchema
    tasks: tuple[TaskSettings, ...]


class HasMoments(Protocol):
    """An optimizer: its `state` holds tensors by name under each parameter."""

    state: Any


@dataclass
class TrainerState:
    """Where a training run stands.

    `history` holds one record a logged step and one a validation, `epochs` what has been trained of each epoch (`Trained`),
    `checkpoints` the step and score of every checkpoint so far, this one included, and where it ends an epoch how many there were
    (`epochs`), `scaling` what `Scaling.state` gave, `skipped` the steps whose gradients were not finite and the requests of those
    steps: they count as trained and changed nothing.
    """

    position: Position = field(default_factory=Position)
    history: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    scaling: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=lambda: {"steps": 0, "requests": 0})


def best_of_epochs(checkpoints: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The checkpoint with the best score of those at an epoch's end, the first of equals; none if no epoch has ended.

    Where no score is defined, the last one, which has trained most.
    """
    ends = [checkpoint for checkpoint in checkpoints if checkpoint["epochs"]]
    scored = [checkpoint for checkpoint in ends if checkpoint["score"] is not None]
    return [max(scored, key=lambda checkpoint: checkpoint["score"])] if scored else ends[-1:]


Tensors = dict[str, torch.Tensor]


def copied(_: str, tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, which training leaves alone."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def weights_of(model: Ranker, whole: Callable[[str, torch.Tensor], torch.Tensor] = copied) -> Tensors:
    """A copy of the weights on the CPU; `whole` copies one, where other workers have parts of it."""
    return {name: whole(name, tensor) for name, tensor in model.state_dict().items()}


def moments_of(
    model: Ranker, optimizer: HasMoments, whole: Callable[[str, torch.Tensor], torch.Tensor] = copied
) -> Tensors:
    """The same of the optimizer's moments, under their parameters' names, a slash and their own."""
    return {
        f"{name}/{key}": whole(f"{name}/{key}", value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def save_model(
    directory: str, model: Ranker, settings: ModelSettings, schema: EventSchema, tasks: tuple[TaskSettings, ...]
) -> str:
    """Writes model.safetensors, then model.json; returns the model version, a hash of the weights and of the settings."""
    return save_weights(directory, weights_of(model), settings, schema, tasks)


def save_weights(
    directory: str, weights: Tensors, settings: ModelSettings, schema: EventSchema, tasks: tuple[TaskSettings, ...]
) -> str:
    """As `save_model`, of weights that `weights_of` has copied."""
    about = {
        "schema_hash": schema.hash(),
        "event_schema": schema.model_dump(mode="json"),
        "model": settings.model_dump(mode="json"),
        "tasks": _TASKS.dump_python(tasks, mode="json"),
    }
    version = _model_version(weights, about)
    write_bytes(f"{directory}/model.safetensors", safetensors.torch.save(weights))
    write_bytes(f"{directory}/model.json", _json({"format_version": FORMAT_VERSION, "model_version": version, **about}))
    return version


def load_model(
    path: str, device: str = "cpu", expected_schema: EventSchema | None = None
) -> tuple[Ranker, CheckpointInfo]:
    """The model under `path`, local or s3://, in eval mode.

    A UserError names what is missing, changed, not finite or does not fit.
    """
    about = _read_json(path, "model.json")
    info = _info(path, about)
    if expected_schema and expected_schema.hash() != info.schema.hash():
        raise UserError(
            f"{path}/model.json: schema {info.schema.hash()} is not the settings' event_schema {expected_schema.hash()}: "
            "use the settings that the checkpoint was trained with, or train again"
        )
    weights = _read_tensors(path, "model.safetensors")
    with torch.random.fork_rng(devices=[]):
        model = make_model(info.model, info.schema, info.tasks)
    _check_same_tensors(path, model.state_dict(), weights)
    stated = {name: about[name] for name in ("schema_hash", "event_schema", "model", "tasks")}
    if _model_version(weights, stated) != info.model_version:
        raise UserError(
            f"{path}/model.safetensors: content is not that of model.json's model_version: copy both files again"
        )
    if not all(bool(torch.isfinite(values).all()) for values in weights.values()):
        raise UserError(f"{path}/model.safetensors: weights that are not finite: train again")
    model.load_state_dict(weights)
    return model.to(device).eval(), info


def load_appendable(
    path: str, device: str = "cpu", expected_schema: EventSchema | None = None
) -> tuple[Longer, CheckpointInfo]:
    """The same for whoever keeps user states; a UserError if this model has none that outlive a request."""
    model, info = load_model(path, device, expected_schema)
    if not isinstance(model, Longer) or not info.model.is_appendable:
        chosen = {name: getattr(info.model, name) for name in ("encoding", "queries")}
        raise UserError(
            f"{path}/model.json: encoder {info.model.encoder.kind} with {chosen} has no user state that can be appended to: serve "
            "a model with encoder longer, encoding appendable and queries recent; this one can be scored by jobs.batch_score"
        )
    return model, info


def load_upstream(model: Ranker, settings: ModelSettings) -> None:
    """Puts the trained user tower that `settings.encoder.upstream` names into a fresh model, if its encoder reads one."""
    encoder = settings.encoder
    if not isinstance(encoder, UserEmbedding):
        return
    if encoder.upstream is None:
        raise UserError(
            "model.encoder.upstream is not given: train a model with encoder user_tower and without interactions first, and name "
            "its checkpoint's folder"
        )
    tower, info = load_model(encoder.upstream)
    wanted = upstream_settings(settings)
    if info.model != wanted:
        names = [name for name in ModelSettings.model_fields if getattr(info.model, name) != getattr(wanted, name)]
        raise UserError(
            f"{encoder.upstream}/model.json: its {', '.join(names)} differ from what model.encoder asks for: train the user tower "
            "with the same model settings, but for encoder user_tower and interactions false"
        )
    cast(EncoderRanker, model).upstream.load_state_dict(tower.state_dict())


def save_trainer(directory: str, moments: Tensors, state: TrainerState) -> None:
    """Writes the optimizer's moments, then the state."""
    write_bytes(f"{directory}/trainer.safetensors", safetensors.torch.save(moments))
    about = {"format_version": TRAINER_VERSION, **asdict(state)}
    write_bytes(f"{directory}/trainer.json", _json(about))


OwnRows = Callable[[str], slice]
"""The rows that this worker holds of a weight or moment, by the name of its parameter, alone or with a slash and more behind."""


def every_row(_: str) -> slice:
    return slice(None)


@torch.no_grad()
def load_own_weights(directory: str, model: Ranker, own_rows: OwnRows = every_row) -> None:
    """Puts this worker's rows of a checkpoint of the same weights into a run's model, of whose tables it may hold those rows only.

    Memory holds one of them at a time beside the model, and nothing of the others' rows.
    """
    weights = model.state_dict()
    for name, tensor in _own_tensors(f"{directory}/model.safetensors", own_rows):
        weights[name].copy_(tensor)


def load_trainer(directory: str, model: Ranker, optimizer: HasMoments, own_rows: OwnRows = every_row) -> TrainerState:
    """Puts this worker's rows of the moments back into `optimizer`, as `load_own_weights`; returns the state saved with them."""
    for name, tensor in _own_tensors(f"{directory}/trainer.safetensors", own_rows):
        parameter_name, key = name.rsplit("/", 1)
        parameter = model.get_parameter(parameter_name)
        optimizer.state[parameter][key] = tensor.to(
            parameter.device, copy=True
        )  # what was read lies in the file's pages
    return read_trainer_state(directory)


def _own_tensors(path: str, own_rows: OwnRows) -> Iterator[tuple[str, torch.Tensor]]:
    """This worker's rows of each tensor in a local file, of which nothing else is read."""
    try:
        opened = safetensors.safe_open(path, "pt")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file on the node of this worker: start from s3://, or from a path that every node sees"
        ) from None
    with opened as file:
        for name in file.keys():  # noqa: SIM118  (it is no dictionary)
            rows = file.get_slice(name)
            yield name, rows[own_rows(name)] if rows.get_shape() else file.get_tensor(name)


def read_trainer_state(path: str) -> TrainerState:
    about = _read_json(path, "trainer.json", TRAINER_VERSION)
    others = {name: about[name] for name in ("history", "epochs", "checkpoints", "scaling", "skipped")}
    return TrainerState(Position(**about["position"]), **others)


_CHANGEABLE = {"history_events", "query_groups", "stride_groups", "dropout"}
"""Model settings under which weights keep their meaning."""


def check_start(path: str, settings: Settings) -> CheckpointInfo:
    """The checkpoint to start training with these settings from, read to the last byte; a UserError names what does not fit."""
    _, info = load_model(path, expected_schema=settings.event_schema)
    asked = settings.model.model_dump(mode="json")
    for name, value in info.model.model_dump(mode="json").items():
        if name not in _CHANGEABLE and asked[name] != value:
            raise UserError(
                f"{path}/model.json: model.{name} is {value}, the settings say {asked[name]}: set model.{name}={value}"
            )
    heads, asked_heads = ([(task.name, task.kind) for task in tasks] for tasks in (info.tasks, settings.train.tasks))
    if heads != asked_heads:
        raise UserError(
            f"{path}/model.json: its tasks are {heads}, train.tasks of the settings {asked_heads}: use the checkpoint's"
        )
    return info


def _info(path: str, about: dict[str, Any]) -> CheckpointInfo:
    try:
        return CheckpointInfo(
            path,
            about["model_version"],
            ModelSettings(**about["model"]),
            EventSchema(**about["event_schema"]),
            _TASKS.validate_python(about["tasks"]),
        )
    except (KeyError, TypeError, ValidationError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(
            f"{path}/model.json: not a model's description ({reason}): was it edited? copy it again"
        ) from None


def _model_version(weights: Mapping[str, torch.Tensor], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_same_tensors(path: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    for name in sorted(expected.keys() | found.keys()):
        wanted, got = (tuple(side[name].shape) if name in side else "absent" for side in (expected, found))
        if wanted != got:
            raise UserError(
                f"{path}/model.safetensors: tensor {name} is {got}, model.json's settings make it {wanted}: "
                "the two files are not of one checkpoint"
            )


def _read_tensors(path: str, name: str) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(read_bytes(f"{path}/{name}"))
    except FileNotFoundError:
        raise UserError(f"{path}/{name}: no such file: is this a checkpoint folder?") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}/{name}: not a safetensors file ({error}): copy it again") from None


def _read_json(path: str, name: str, version: int = FORMAT_VERSION) -> dict[str, Any]:
    try:
        about = json.loads(read_bytes(f"{path}/{name}"))
    except FileNotFoundError:
        raise UserError(f"{path}/{name}: no such file: is this a checkpoint folder?") from None
    except ValueError:
        raise UserError(f"{path}/{name}: not valid JSON: copy it again") from None
    if about.get("format_version") != version:
        raise UserError(
            f"{path}/{name}: format version {about.get('format_version')}, this release reads {version}: "
            "use the release that wrote it, or train again"
        )
    return about


def _json(about: dict[str, Any]) -> bytes:
    return json.dumps(about, indent=1).encode()
