"""A log that is prepared once a machine, and mapped into the memory of every process that reads it."""

import fcntl
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.quality_study.log import Log
from longer.arrays import Histories


def cached(folder: Path, make: Callable[[], Log]) -> Log | None:
    """What `make` returns, kept in the folder; None while another process makes it, which takes minutes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        with Path(f"{folder}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            if not folder.exists():
                _write(folder, make())
    return _read(folder)


def _write(folder: Path, log: Log) -> None:
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    histories = log.histories
    arrays = {name: x for name, x in vars(histories).items() if name != "features"}
    for name, values in (arrays | {f"feature.{name}": x for name, x in histories.features.items()}).items():
        np.save(unfinished / f"{name}.npy", values)
    names = {"arrays": [*arrays], "features": [*histories.features]}
    (unfinished / "rest.pickle").write_bytes(pickle.dumps((replace(log, histories=None), names)))  # type: ignore[arg-type]
    unfinished.rename(folder)


def _read(folder: Path) -> Log:
    log, names = pickle.loads((folder / "rest.pickle").read_bytes())
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names["arrays"]}
    features = {name: np.load(folder / f"feature.{name}.npy", mmap_mode="r") for name in names["features"]}
    return replace(log, histories=Histories(**arrays, features=features))
