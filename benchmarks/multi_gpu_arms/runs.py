"""Training through Ray Train on all devices, killed and resumed on half of them: python -m benchmarks.multi_gpu_arms.runs

A generated log becomes tables by the platform's own jobs. `jobs.train`'s own call trains on them with W workers until one of them
is killed with SIGKILL, in the middle of an epoch; the same call with W/2 workers goes on from the last checkpoint to the end. The
requests that were trained, whose hashed ids each worker adds up as it takes its steps, must be those of the table, each once an
epoch. Impressions per second are those between records of each part, without its first third, in which kernels are compiled.

Prints Markdown; last, one JSON line.
"""

import argparse
import json
import os
import shutil
import signal
import time
from typing import Any

import numpy as np
import ray
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

EVERY = 16 if ON_CUDA else 6
"""Steps between checkpoints."""
DIES_AT_STEP = EVERY + EVERY // 4
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


def disturbed(settings: Settings, num_workers: int) -> Version:
    """The checkpoint of a run of which a worker is killed, resumed with half as many."""
    for folder in ("training", "checkpoints"):
        shutil.rmtree(settings.path(folder), ignore_errors=True)
    run.train_worker = worker_that_dies
    try:
        run.train(settings)
        raise RuntimeError("the run was not killed: it has too few steps")
    except TrainingFailedError:
        pass
    finally:
        run.train_worker = train_worker
    train = settings.train.model_copy(update={"num_workers": max(1, num_workers // 2)})
    return run.train(settings.model_copy(update={"train": train}))


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
    parser.add_argument("--users-each", type=int, default=400 if ON_CUDA else 15, help="users a worker")
    parser.add_argument("--events-each", type=int, default=160_000 if ON_CUDA else 3_000, help="events a worker")
    parser.add_argument(
        "--tokens", type=int, default=200_000 if ON_CUDA else 5_000, help="of a worker's part of a step"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--sharding", default="replicated", help="train.table_sharding (default replicated)")
    parser.add_argument("--data", default="runs/benchmark_multi_gpu", help="folder for tables, which stay")
    parser.add_argument("--prepare", action="store_true", help="build the tables only")
    asked = parser.parse_args()
    asked.users, asked.events = (
        asked.workers * asked.users_each,
        asked.workers * asked.events_each,
    )  # as many steps for any W
    train = {"epochs": asked.epochs, "validate_every_steps": EVERY, "max_failures": 0, "table_sharding": asked.sharding}
    most = asked.tokens + asked.length + 2_000  # so that half the workers take a step in two batches each
    train |= {
        "num_workers": asked.workers,
        "tokens_per_step": asked.workers * asked.tokens,
        "max_tokens_per_batch": most,
    }
    settings = settings_of(asked, **train)
    settings = settings.model_copy(update={"ray": settings.ray.model_copy(update={"num_cpus": 4 * asked.workers + 4})})
    start_ray(settings.ray)
    for job in (generate_events, build_sequences, build_requests):
        job.run(settings)
    if asked.prepare:
        return
    started = time.perf_counter()
    version = disturbed(settings, asked.workers)
    spent_s, found, exact = time.perf_counter() - started, parts(version), is_exact(settings, version)
    num_workers = [asked.workers, max(1, asked.workers // 2)]
    figures = {num: rates(records[len(records) // 3 :]) for num, records in zip(num_workers, found, strict=True)}
    resumed_at, num_steps = found[0][-1]["step"], found[-1][-1]["step"]
    (trained,) = version.manifest["trained"]
    print(f"\n## Through Ray Train, {asked.sharding} tables\n")
    sizes = f"{asked.users:,} users, {asked.events:,} events, at most {asked.tokens:,} tokens a worker and step"
    print(f"Width {asked.width}, L = {asked.length:,}, {sizes}.\n")
    print("| workers | impressions/s | waiting for data |\n|---|---|---|")
    for num, (rate, waits) in figures.items():
        print(f"| {num} | {rate:,.0f} | {waits:.1%} |")
    print(f"\nKilled at step {DIES_AT_STEP} of {num_steps} with {num_workers[0]} workers, resumed at step {resumed_at} with "
          f"{num_workers[1]}: {sum(epoch['num_requests'] for epoch in trained['epochs']):,} requests trained, "
          f"{'each once an epoch' if exact else 'NOT each once an epoch'}. {spent_s:.0f} s in all.\n")  # fmt: skip
    print(json.dumps({
        "resume_exact": exact, "resumed_at": resumed_at, "killed_at": DIES_AT_STEP, "steps": num_steps,
        "impressions_per_s": {str(num): round(rate) for num, (rate, _) in figures.items()},
        "data_wait_share": {str(num): round(waits, 4) for num, (_, waits) in figures.items()},
    }))  # fmt: skip
    ray.shutdown()


if __name__ == "__main__":
    main()
