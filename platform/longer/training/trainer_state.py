"""What a run needs to go on, beside its model: where it stands, and the optimizer's moments; each worker reads its own rows.

trainer.safetensors    the optimizer's moments, float32
trainer.json           the position in the data, the history so far, what has been trained in each epoch, checkpoints before, and a
                       hash of all this and of the moments

Random numbers need no state: those of a step are a function of seed, step and worker.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch

from longer.errors import UserError
from longer.files import checksum, write_bytes
from longer.model.ranker import Ranker
from longer.storage import fingerprint
from longer.training.checkpoints import Tensors, as_json, copied, read_json
from longer.training.cursor import Position

TRAINER_VERSION = 4
"""Of trainer.json and trainer.safetensors. Part of a run's id: a run of another format is another run."""


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


def moments_of(
    model: Ranker, optimizer: HasMoments, whole: Callable[[str, torch.Tensor], torch.Tensor] = copied
) -> Tensors:
    """The same of the optimizer's moments, under their parameters' names, a slash and their own."""
    return {
        f"{name}/{key}": whole(f"{name}/{key}", value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def save_trainer(directory: str, moments: Tensors, state: TrainerState) -> None:
    """Writes the optimizer's moments, then the state with a hash of both."""
    tensors, stated = safetensors.torch.save(moments), asdict(state)
    write_bytes(f"{directory}/trainer.safetensors", tensors)
    content = fingerprint(hashlib.sha256(tensors).hexdigest(), stated)
    write_bytes(f"{directory}/trainer.json", as_json({"format_version": TRAINER_VERSION, "content": content, **stated}))


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


def check_trainer(path: str) -> TrainerState:
    """The state saved at `path`; a UserError unless it and the moments are, to the last byte, what was saved."""
    about = read_json(path, "trainer.json", TRAINER_VERSION)
    stated = {name: value for name, value in about.items() if name not in ("format_version", "content")}
    if fingerprint(checksum(f"{path}/trainer.safetensors"), stated) != about.get("content"):
        raise UserError(f"{path}/trainer.json: its content is not what was saved: start from another checkpoint")
    return read_trainer_state(path)


def read_trainer_state(path: str) -> TrainerState:
    about = read_json(path, "trainer.json", TRAINER_VERSION)
    others = {name: about[name] for name in ("history", "epochs", "checkpoints", "scaling", "skipped")}
    return TrainerState(Position(**about["position"]), **others)
