"""The folders of training runs: which checkpoints stay, and Ray's record of them, mended where a kill has damaged it.

RUN/step_0000100/...                     a checkpoint, whole once trainer.json is there, the last of its four files
RUN/checkpoint_manager_snapshot.json     which checkpoints count, by Ray, which overwrites it in place
RUN/start.json                           of which requests it is, and the checkpoint whose weights or user tower were its first
RUN/tensorboard/...                      scalars
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import ray
from ray.train import Checkpoint, UserCallback

from longer.errors import StorageError, UserError
from longer.files import file_sizes, read_bytes, remove_tree, write_bytes
from longer.progress import say
from longer.storage import Table
from longer.training.checkpoints import check_model
from longer.training.trainer_state import TrainerState, best_of_epochs, check_trainer

T = TypeVar("T")

RECORD = "checkpoint_manager_snapshot.json"
_NOTE = "start.json"
_FILES = {"model.safetensors", "model.json", "trainer.safetensors", "trainer.json"}


def step_folder(step: int) -> str:
    """A checkpoint's folder in that of its run; by name they are in the order of steps."""
    return f"step_{step:07d}"


class KeepBestAndLast(UserCallback):
    """Once a checkpoint is committed, those before it that it says nobody needs any more lose their tensors.

    Those from which other runs have started keep them: a run reads its base whenever its command is given. Ray keeps the best
    ones or the last ones, not both, and its record of a run names the folders of all: they stay, with model.json.
    """

    def __init__(self, run_path: str) -> None:
        self._run_path = run_path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        newest, keep = step_folder(metrics[0]["step"]), {*map(step_folder, metrics[0]["keep"])}
        with suppress(OSError, StorageError):  # what storage does not list or remove now is stale the next time too
            needed = _bases(os.path.dirname(self._run_path))
            for path in file_sizes(self._run_path):
                folder, _, file = path.partition("/")
                stale = folder.startswith("step_") and folder < newest and folder not in keep
                if stale and file != "model.json" and _real(f"{self._run_path}/{folder}") not in needed:
                    remove_tree(f"{self._run_path}/{path}")


def note_start(run_path: str, requests: str, base: str | None) -> None:
    """Notes which requests a run trains, and which checkpoint it needs whenever it starts: one of a run beside it stays."""
    write_bytes(f"{run_path}/{_NOTE}", json.dumps({"requests": requests, "base": base}).encode())


def tell_what_is_left(folder: str, table: Table, run: str, requests: str) -> None:
    """A line, where a run of these requests begins, names runs of other ones that have published nothing.

    Their commands go on with them no more, but some may be going on elsewhere: it is not for this one to remove them.
    """
    with suppress(OSError, UserError):
        notes, parts = _notes(folder), _parts_of(folder)  # in this order: another run may begin meanwhile
        if RECORD in parts.get(run, ()):
            return
        of_others = [other for other, note in notes.items() if note["requests"] != requests]
        left = [
            one for one in of_others if any(part.startswith("step_") for part in parts[one]) and not table.find(one)
        ]
        if left:
            say(
                "train",
                f"run {run} begins on requests {requests}; runs of other ones have published nothing: {', '.join(left)}: start "
                f"from one with --from {folder}/RUN/step_N, or remove the folders of those that you have given up",
            )


def _notes(folder: str) -> dict[str, dict[str, Any]]:
    """What `note_start` has noted of the runs in a folder; nothing of a run whose note is damaged, which its start writes anew."""
    notes = {}
    for path in file_sizes(folder):
        if path.endswith(f"/{_NOTE}"):
            with suppress(ValueError):  # no other run may fail at it
                notes[os.path.dirname(path)] = json.loads(read_bytes(f"{folder}/{path}"))
    return notes


def _bases(folder: str) -> set[str]:
    """The checkpoints that the runs in a folder have noted."""
    return {_real(note["base"]) for note in _notes(folder).values() if note["base"]}


def _real(path: str) -> str:
    """The one path of a folder, whatever links and dots lead to it."""
    return path if "://" in path else os.path.realpath(path)


def remove_old_runs(folder: str, table: Table, num_kept: int) -> None:
    """Of published runs but the newest, only the scalars stay; what they published lies in the checkpoints table.

    A run that has published nothing stays: it may be going on elsewhere, or wait for its command. So does one with the
    checkpoint from which another one starts.
    """
    with suppress(OSError, UserError):  # what storage does not list, read or remove now is old the next time too
        parts = _parts_of(folder)
        published = [version for run in parts if (version := table.find(run))]
        published.sort(key=lambda version: version.manifest["published_at"])
        needed = {os.path.dirname(base) for base in _bases(folder)}
        removed = []
        for run in [version.id for version in published][:-num_kept]:
            large = {path.partition("/")[0] for path in parts[run]} - {"tensorboard"}
            if large and _real(f"{folder}/{run}") not in needed:
                for part in sorted(large, key=lambda name: name != RECORD):  # first: it must not name what is gone
                    remove_tree(f"{folder}/{run}/{part}")
                removed.append(run)
        if removed:
            say(
                "train",
                f"removed the checkpoints of older runs, published ones (train.keep_runs): {', '.join(removed)}",
            )


def mend_record(run_path: str) -> None:
    """Makes Ray's record of a run one from which the run can go on, or removes it; says a line where it was not.

    A kill while Ray writes it leaves half of it, and a disk may lose a part of the checkpoint that it names last, or change it: the
    run would never start again, or go on from other weights without a word.
    """
    parts = _parts_of(run_path)
    if RECORD not in parts or _is_whole(run_path, parts):
        return
    states = _whole_checkpoints(run_path, parts)
    if not states:
        remove_tree(f"{run_path}/{RECORD}")
        say("train", f"{run_path}/{RECORD} was damaged and no checkpoint is whole: the run starts anew")
        return
    results = [
        {"version": 0, "checkpoint_dir_name": folder, "metrics": state.checkpoints[-1]}
        for folder, state in states.items()
    ]
    record = {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    write_bytes(f"{run_path}/{RECORD}", json.dumps(record).encode())
    say(
        "train",
        f"{run_path}/{RECORD} or its newest checkpoint was damaged: made anew from the {len(results)} whole checkpoints there",
    )


def best_that_is_whole(run_path: str, checkpoints: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `best_of_epochs` says of the checkpoints whose model is whole, as the last one's is; a line if it is not the best."""
    left = list(checkpoints)
    while True:
        (best,) = best_of_epochs(left)
        path = f"{run_path}/{step_folder(best['step'])}"
        if _unless_damaged(check_model, path):
            return best
        left.remove(best)
        say("train", f"{path}, the best by validation, is damaged: the next best takes its place")


def _parts_of(path: str) -> dict[str, set[str]]:
    """The files below each folder of a run, or of the folder of all runs; a file beside them counts as a folder."""
    parts: dict[str, set[str]] = {}
    for file in file_sizes(path):
        folder, _, rest = file.partition("/")
        parts.setdefault(folder, set()).add(rest)
    return parts


def _whole_checkpoints(run_path: str, parts: dict[str, set[str]]) -> dict[str, TrainerState]:
    """By folder, in the order of steps."""
    found = {folder: _state_of(f"{run_path}/{folder}", parts[folder]) for folder in sorted(parts)}
    return {folder: state for folder, state in found.items() if state}


def _is_whole(run_path: str, parts: dict[str, set[str]]) -> bool:
    try:
        about = json.loads(read_bytes(f"{run_path}/{RECORD}"))
        latest = about["latest_checkpoint_result"]
        named = {result["checkpoint_dir_name"] for result in about["checkpoint_results"]}
    except (ValueError, KeyError, TypeError):
        return False
    if latest is None:
        return named <= parts.keys()
    newest = latest["checkpoint_dir_name"]
    return named <= parts.keys() and _state_of(f"{run_path}/{newest}", parts[newest]) is not None


def _state_of(path: str, files: set[str]) -> TrainerState | None:
    """Of a checkpoint that is there, to the last byte of its files; else None."""
    if not files >= _FILES or not _unless_damaged(check_model, path):
        return None
    return _unless_damaged(check_trainer, path)


def _unless_damaged(check: Callable[[str], T], path: str) -> T | None:
    """What a check of a checkpoint gives; None if there is half a file, or other bytes, or another release's."""
    try:
        return check(path)
    except StorageError:  # what cannot be read now may be whole
        raise
    except UserError:
        return None
