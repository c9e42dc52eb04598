"""Checkpoints that cannot run code: safetensors for tensors, JSON for the rest, on local disk or S3.

model.safetensors      weights
model.json             format, model version, schema, model settings, tasks: all that serving needs

What only a run that goes on needs lies beside them (`longer.training.trainer_state`).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError

from longer.config import Settings
from longer.encoder_settings import UserEmbedding
from longer.errors import UserError
from longer.files import read_bytes, write_bytes
from longer.model.encoders.factory import make_model, upstream_settings
from longer.model.encoders.ranker import EncoderRanker
from longer.model.longer import Longer
from longer.model.ranker import Ranker
from longer.model_settings import ModelSettings
from longer.schema import EventSchema
from longer.training_settings import TaskSettings

FORMAT_VERSION = 3
"""Of model.json and model.safetensors."""

_TASKS: TypeAdapter[tuple[TaskSettings, ...]] = TypeAdapter(tuple[TaskSettings, ...])


@dataclass(frozen=True)
class CheckpointInfo:
    """What a model is, apart from its weights."""

    path: str
    model_version: str
    model: ModelSettings
    schema: EventSchema
    tasks: tuple[TaskSettings, ...]


Tensors = dict[str, torch.Tensor]


def copied(_: str, tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, which training leaves alone."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def weights_of(model: Ranker, whole: Callable[[str, torch.Tensor], torch.Tensor] = copied) -> Tensors:
    """A copy of the weights on the CPU; `whole` copies one, where other workers have parts of it."""
    return {name: whole(name, tensor) for name, tensor in model.state_dict().items()}


def save_weights(
    directory: str, weights: Tensors, settings: ModelSettings, schema: EventSchema, tasks: tuple[TaskSettings, ...]
) -> str:
    """Writes model.safetensors, then model.json, of weights that `weights_of` has copied.

    Returns the model version, a hash of the weights and of the settings.
    """
    about = {
        "schema_hash": schema.hash(),
        "event_schema": schema.model_dump(mode="json"),
        "model": settings.model_dump(mode="json"),
        "tasks": _TASKS.dump_python(tasks, mode="json"),
    }
    version = _model_version(weights, about)
    write_bytes(f"{directory}/model.safetensors", safetensors.torch.save(weights))
    write_bytes(
        f"{directory}/model.json", as_json({"format_version": FORMAT_VERSION, "model_version": version, **about})
    )
    return version


def load_model(
    path: str, device: str = "cpu", expected_schema: EventSchema | None = None
) -> tuple[Ranker, CheckpointInfo]:
    """The model under `path`, local or s3://, in eval mode.

    A UserError names what is missing, changed, not finite or does not fit.
    """
    about = read_json(path, "model.json")
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
    _check_content(path, about, weights)
    if not all(bool(torch.isfinite(values).all()) for values in weights.values()):
        raise UserError(f"{path}/model.safetensors: weights that are not finite: train again")
    model.load_state_dict(weights)
    return model.to(device).eval(), info


def read_info(path: str) -> CheckpointInfo:
    """What the model under `path` is, without a look at its weights."""
    return _info(path, read_json(path, "model.json"))


def check_model(path: str) -> str:
    """The version of the model under `path`; a UserError unless both of its files are, to the last byte, what was saved."""
    about = read_json(path, "model.json")
    _check_content(path, about, _read_tensors(path, "model.safetensors"))
    return about["model_version"]


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


def check_upstream(settings: ModelSettings) -> CheckpointInfo | None:
    """The trained user tower that `settings.encoder.upstream` names, if the encoder reads one; a UserError if it does not fit."""
    found = _read_upstream(settings)
    return found[1] if found else None


def load_upstream(model: Ranker, settings: ModelSettings) -> None:
    """Puts that user tower into a fresh model."""
    if found := _read_upstream(settings):
        cast(EncoderRanker, model).upstream.load_state_dict(found[0].state_dict())


def _read_upstream(settings: ModelSettings) -> tuple[Ranker, CheckpointInfo] | None:
    encoder = settings.encoder
    if not isinstance(encoder, UserEmbedding):
        return None
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
    return tower, info


_CHANGEABLE = {"history_events", "query_groups", "stride_groups", "dropout"}
"""Model settings under which weights keep their meaning, and their shapes but for a few encodings and queries."""


def check_start(path: str, settings: Settings) -> CheckpointInfo:
    """The checkpoint to start training with these settings from, read to the last byte; a UserError names what does not fit."""
    model, info = load_model(path, expected_schema=settings.event_schema)
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
    if settings.model != info.model:
        _check_same_shapes(model, info, settings.model)
    return info


def _check_same_shapes(model: Ranker, info: CheckpointInfo, asked: ModelSettings) -> None:
    """Of the checkpoint's model and of one with the settings asked for."""
    with torch.random.fork_rng(devices=[]):
        wanted = make_model(asked, info.schema, info.tasks).state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.shape != wanted[name].shape:
            own = {one: getattr(info.model, one) for one in sorted(_CHANGEABLE)}
            changed = ", ".join(f"model.{one}={value}" for one, value in own.items() if getattr(asked, one) != value)
            raise UserError(
                f"{info.path}/model.safetensors: {name} is {tuple(tensor.shape)}, the settings make it "
                f"{tuple(wanted[name].shape)}: set {changed} as the checkpoint has it"
            )


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


def _check_content(path: str, about: dict[str, Any], weights: Tensors) -> None:
    stated = {name: value for name, value in about.items() if name not in ("format_version", "model_version")}
    if _model_version(weights, stated) != about.get("model_version"):
        raise UserError(
            f"{path}/model.safetensors: content is not that of model.json's model_version: copy both files again"
        )


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
        raise UserError(
            f"{path}/{name}: no such file: a run keeps few checkpoints whole (train.keep_checkpoints): name a newer one, or "
            "what it has published"
        ) from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}/{name}: not a safetensors file ({error}): copy it again") from None


def read_json(path: str, name: str, version: int = FORMAT_VERSION) -> dict[str, Any]:
    """The JSON file `name` of the checkpoint at `path`; a UserError if it is not there, damaged or of another format."""
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


def as_json(about: dict[str, Any]) -> bytes:
    return json.dumps(about, indent=1).encode()
