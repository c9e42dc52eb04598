"""Training through Ray Train on all devices, killed and resumed on half of them: python -m benchmarks.multi_gpu_arms.runs

A generated log becomes tables by the platform's own jobs. `jobs.train`'s own call trains on them with W workers until one of them
is killed with SIGKILL, in the middle of an epoch; the same call with W/2 workers goes on from the last checkpoint to the end. The
requests that were trained, whose hashed ids each worker adds up as it takes its steps, must be those of the table, each once an
epoch. The validation loss must be that of a run with W workers that nobody disturbed, which a process of its own trains on the same
devices: at the same time, or afterwards with --compiled. Impressions per second, told only then, are those between records of each
part, without its first third, in which kernels are compiled.

Prints Markdown; last, one JSON line.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.train import TrainingFailedError

from benchmarks.end_to_end import rates, settings_of
from benchmarks.model_arms.sizes import ON_CUDA
from jobs import build_requests, build_sequences, generate_events
from longer.config import Settings
from longer.data.tables import RequestTable
from longer.runner import start_ray
from longer.storage import Version
from longer.training import loop, run
from longer.training.content import tally
from longer.training.loop import Run, Work, train_worker

EVERY = 8 if ON_CUDA else 6
"""Steps between checkpoints."""
DIES_AT_STEP = EVERY + EVERY // 4
_TABLE_ROWS = {"item_rows": 200_000 if ON_CUDA else 20_000, "user_rows": 2_000}
"""As many as there are items, and enough for the users: a checkpoint, which holds them all, is not what takes time here."""

_COMMITTED_WITHIN_S = 5
"""Longer than Ray's controller takes to take note of a checkpoint."""


class _Dies(Run):
    """A worker that is killed, once, after the first checkpoint."""

    def _step(self, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rank == self.num_workers - 1 and self.cursor.global_step(work.position) == DIES_AT_STEP:
            time.sleep(_COMMITTED_WITHIN_S)
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._step(work)


def worker_that_dies(config: dict[str, Any]) -> None:
    loop.Run = _Dies  # type: ignore[misc]
    train_worker(config)


def from_first_step(settings: Settings) -> Version:
    """The checkpoint of a run that resumes nothing."""
    for folder in ("training", "checkpoints"):
        shutil.rmtree(settings.path(folder), ignore_errors=True)
    return run.train(settings)


def disturbed(settings: Settings, num_workers: int) -> Version:
    """The checkpoint of a run of which a worker is killed, resumed with half as many."""
    run.train_worker = worker_that_dies
    try:
        from_first_step(settings)
        raise RuntimeError("the run was not killed: it has too few steps")
    except TrainingFailedError:
        tell("the run that was killed has ended")
    finally:
        run.train_worker = train_worker
    train = settings.train.model_copy(update={"num_workers": max(1, num_workers // 2)})
    return run.train(settings.model_copy(update={"train": train}))


class Undisturbed:
    """A run with all workers and the same tables, in a process with a Ray and checkpoints of its own."""

    def __init__(self) -> None:
        assert __spec__
        command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--undisturbed"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        subprocess.Popen(["sed", "-u", "s/^/undisturbed: /"], stdin=self._process.stderr, stdout=sys.stderr)

    def found(self) -> dict[str, Any]:
        """Its validation loss, and whether it trained each request once, when it has ended."""
        assert self._process.stdout
        told = [json.loads(line) for line in self._process.stdout if line.startswith("{")]  # others are Ray's
        if self._process.wait():
            raise RuntimeError("the undisturbed run failed")
        return dict(told[-1])


def train_undisturbed(settings: Settings) -> None:
    """What the process of `Undisturbed` does."""
    tables = Path(settings.path("tables")).resolve()
    alone = settings.model_copy(update={"root": f"{settings.root}/undisturbed"})
    shutil.rmtree(alone.root, ignore_errors=True)
    Path(alone.root).mkdir()
    Path(alone.path("tables")).symlink_to(tables)
    version = run.train(alone)
    print(json.dumps({"loss": validation_loss(version), "exact": is_exact(alone, version)}))


def tell(what: str) -> None:
    """Where the time goes."""
    print(f"resume: {time.strftime('%X')}: {what}", file=sys.stderr, flush=True)


def validation_loss(version: Version) -> float:
    """Of the weights that it publishes, which are those of its epoch's end."""
    (task,) = version.manifest["validation"].values()
    return float(task["logloss"])


def is_exact(settings: Settings, version: Version) -> bool:
    """Whether every epoch trained each request of the table's training split once."""
    table = RequestTable(settings.path("tables", "requests"), settings.event_schema)
    ids = np.concatenate([table.read("train", bucket).request_id_R for bucket in range(table.num_buckets)])
    (trained,) = version.manifest["trained"]
    return trained["requests"] == table.version.id and trained["epochs"] == [tally(ids)] * settings.train.epochs


def parts(version: Version) -> list[list[dict[str, Any]]]:
    """The records of speed of each part of the run: where it was resumed, impressions are counted from zero again."""
    records = [record for record in version.manifest["history"] if "elapsed_s" in record]
    counts = [record["impressions_per_s"] * record["elapsed_s"] for record in records]
    starts = [n for n in range(1, len(records)) if counts[n] < counts[n - 1]]
    return [records[begin:end] for begin, end in zip([0, *starts], [*starts, len(records)], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    num_devices = torch.cuda.device_count() if ON_CUDA else 2
    parser.add_argument("--workers", type=int, default=num_devices, help="W (default: one a device)")
    parser.add_argument("--width", type=int, default=512 if ON_CUDA else 32, help="D (default 512; 32 on a CPU)")
    parser.add_argument("--length", type=int, default=2_000 if ON_CUDA else 256, help="L (default 2,000; 256 on a CPU)")
    parser.add_argument("--users-each", type=int, default=200 if ON_CUDA else 15, help="users a worker")
    parser.add_argument("--events-each", type=int, default=80_000 if ON_CUDA else 3_000, help="events a worker")
    parser.add_argument(
        "--tokens", type=int, default=200_000 if ON_CUDA else 5_000, help="of a worker's part of a step"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--sharding", default="replicated", help="train.table_sharding (default replicated)")
    parser.add_argument("--compiled", action="store_true", help="compile as `jobs.train` does, and tell the speed")
    parser.add_argument("--data", default="runs/benchmark_multi_gpu", help="folder for tables, which stay")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--prepare", action="store_true", help="build the tables only")
    only.add_argument("--undisturbed", action="store_true", help="only that run, on tables that are there")
    asked = parser.parse_args()
    tell("begins")
    asked.users, asked.events = (
        asked.workers * asked.users_each,
        asked.workers * asked.events_each,
    )  # as many steps for any W
    if not asked.compiled:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the workers inherit it
    settings = settings_of(asked, **_train(asked))
    of_model = settings.model.model_copy(update=_TABLE_ROWS)
    of_ray = settings.ray.model_copy(update={"num_cpus": 4 * asked.workers + 4})
    settings = settings.model_copy(update={"model": of_model, "ray": of_ray})
    start_ray(settings.ray)
    if asked.undisturbed:
        train_undisturbed(settings)
        return
    for job in (generate_events, build_sequences, build_requests):
        job.run(settings)
    tell("tables are there")
    if not asked.prepare:
        measure(asked, settings)


def measure(asked: argparse.Namespace, settings: Settings) -> None:
    """Tells what the resumed run shows, then what the undisturbed one adds to it."""
    beside = None if asked.compiled else Undisturbed()  # speed is told of a run that is alone
    resumed = disturbed(settings, asked.workers)
    tell("the resumed run has ended")
    found = _found(asked, resumed, is_exact(settings, resumed))
    _print(asked, found)
    whole = (beside or Undisturbed()).found()
    tell("the undisturbed run has ended")
    losses = {"undisturbed": whole["loss"], "resumed": validation_loss(resumed)}
    found |= {
        "resume_exact": found["resume_exact"] and whole["exact"],
        "losses": losses,
        "loss_difference": losses["resumed"] / losses["undisturbed"] - 1,
    }
    _print(asked, found)


def _train(asked: argparse.Namespace) -> dict[str, Any]:
    """Settings of the run with all workers."""
    return {
        "epochs": asked.epochs,
        "validate_every_steps": EVERY,
        "max_validation_requests": 200,
        "max_failures": 0,
        "table_sharding": asked.sharding,
        "num_workers": asked.workers,
        "tokens_per_step": asked.workers * asked.tokens,
        "max_tokens_per_batch": asked.tokens + asked.length + 2_000,  # half the workers take a step in two batches each
    }


def _found(asked: argparse.Namespace, resumed: Version, exact: bool) -> dict[str, Any]:
    """Of the run that was killed and resumed."""
    of_parts, num_workers = parts(resumed), [asked.workers, max(1, asked.workers // 2)]
    (trained,) = resumed.manifest["trained"]
    found = {
        "resume_exact": exact,
        "workers": num_workers,
        "killed_at": DIES_AT_STEP,
        "resumed_at": of_parts[0][-1]["step"],
        "steps": of_parts[-1][-1]["step"],
        "num_requests": sum(epoch["num_requests"] for epoch in trained["epochs"]),
    }
    if asked.compiled:
        speed = [rates(records[len(records) // 3 :]) for records in of_parts]
        found["impressions_per_s"] = {str(n): round(rate) for n, (rate, _) in zip(num_workers, speed, strict=True)}
        found["data_wait_share"] = {str(n): round(waits, 4) for n, (_, waits) in zip(num_workers, speed, strict=True)}
    return found


def _print(asked: argparse.Namespace, found: dict[str, Any]) -> None:
    first, half = found["workers"]
    print(f"\n## Through Ray Train, {asked.sharding} tables\n")
    sizes = f"{asked.users:,} users, {asked.events:,} events, at most {asked.tokens:,} tokens a worker and step"
    print(f"Width {asked.width}, L = {asked.length:,}, {sizes}{'' if asked.compiled else '; nothing compiled'}.\n")
    print(
        f"Killed at step {found['killed_at']} of {found['steps']} with {first} workers, resumed at step {found['resumed_at']} "
        f"with {half}: {found['num_requests']:,} requests trained, {'each once' if found['resume_exact'] else 'NOT each once'} "
        "an epoch."
    )
    if "losses" in found:
        print(
            f"Validation log loss of the published weights: {found['losses']['resumed']:.5f}, of a run with {first} workers that "
            f"nobody disturbed {found['losses']['undisturbed']:.5f}, {found['loss_difference']:+.1e} of it apart. It ran on the "
            f"same devices {'afterwards' if asked.compiled else 'at the same time'}."
        )
    for num, rate in found.get("impressions_per_s", {}).items():
        print(
            f"{num} workers: {rate:,} impressions/s, {found['data_wait_share'][num]:.1%} of the time waiting for data."
        )
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
