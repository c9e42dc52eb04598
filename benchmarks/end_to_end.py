"""Training from Parquet through Ray Train against its model step alone: python -m benchmarks.end_to_end [--width 512]

A generated log of users with Zipf activity becomes tables by the platform's own jobs; then, on one worker (a GPU if there is one):

    steps         `longer.training.run.train`: impressions per second between its records. Left out are the first fifth of the
                  steps, in which kernels are compiled, and what is not a step: reading the tables, starting workers, validations,
                  and the wait for a checkpoint's copy
    whole run     the same run, nothing left out: from the call of `train` to its manifest, with a validation and a checkpoint every
                  100 steps. The shorter the run, the more of it are fixed costs
    model step    the same model and the same steps, their batches staged in memory before the clock starts and, as in the run,
                  filled up to one size: the largest of the steps that are timed, where the run takes its own largest

Prints Markdown; last, one JSON line: the shares of the model step's rate, and the share of time between records that was spent
waiting for data.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.model_arms.arms import free_memory
from benchmarks.model_arms.sizes import DEVICE, ON_CUDA, seconds
from jobs import build_requests, build_sequences, generate_events
from longer.config import Settings, load_settings
from longer.model.longer import Longer
from longer.runner import start_ray
from longer.training.content import Content, Job, Tables
from longer.training.run import pin_tables, train
from longer.training.steps import Stepper

WARM_UP_SHARE = 0.2


def main() -> None:
    page, found = measure(sys.argv[1:])
    print(f"{page}\n\n{json.dumps(found)}")


def prepare(given: Sequence[str]) -> None:
    """What may be done while others use the device: tables, and on CUDA kernels, which the workers find on disk."""
    asked = options(given)
    settings = _with_tables(asked)
    if ON_CUDA:
        _model_step(settings, 1, validates=True)
        free_memory()


def measure(given: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The page, and what it says for a program; alone on the device."""
    asked = options(given)
    settings = _with_tables(asked)
    shutil.rmtree(settings.path("training"), ignore_errors=True)
    shutil.rmtree(settings.path("checkpoints"), ignore_errors=True)
    started = time.perf_counter()
    version = train(settings)
    whole_s = time.perf_counter() - started
    records = [record for record in version.manifest["history"] if "elapsed_s" in record]
    end_to_end, waits = rates([r for r in records if r["step"] >= WARM_UP_SHARE * records[-1]["step"]])
    whole = records[-1]["impressions_per_s"] * records[-1]["elapsed_s"] / whole_s
    alone = _model_step(settings, asked.steps)
    ray.shutdown()
    lengths = (
        f"{asked.users:,} users, {asked.events:,} events, L = {asked.length:,}, at most {asked.tokens:,} tokens a step"
    )
    lines = [
        f"\nEnd to end, width {asked.width}: {lengths}\n\n| arm | impressions/s |\n|---|---|",
        f"| steps, end to end | {end_to_end:,.0f} |\n| whole run, {whole_s:.0f} s | {whole:,.0f} |",
        f"| model step | {alone:,.0f} |",
        "\nA goal against the model step is one against batches that are filled up as well, to the largest of the steps that are "
        f"timed, where the run fills up to its largest. Histories average under {asked.events / asked.users:,.0f} events.",
    ]
    return "\n".join(lines), {
        "impressions_per_s": {
            "end to end": round(end_to_end),
            "whole run": round(whole),
            "model step": round(alone),
        },
        "end_to_end_share": end_to_end / alone,
        "whole_run_share": whole / alone,
        "data_wait_share": waits,
    }


def options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256 if ON_CUDA else 32, help="D (default 256; 32 on a CPU)")
    parser.add_argument("--length", type=int, default=2_000 if ON_CUDA else 256, help="L (default 2,000; 256 on a CPU)")
    parser.add_argument("--users", type=int, default=1_000 if ON_CUDA else 20)
    parser.add_argument("--events", type=int, default=400_000 if ON_CUDA else 3_000)
    parser.add_argument("--tokens", type=int, default=200_000 if ON_CUDA else 6_000, help="train.tokens_per_step")
    parser.add_argument("--steps", type=int, default=40 if ON_CUDA else 6, help="steps of the model step's loop")
    parser.add_argument("--data", default="runs/benchmark_end_to_end", help="folder for tables, which stay")
    return parser.parse_args(given)


def _with_tables(asked: argparse.Namespace) -> Settings:
    settings = settings_of(asked)
    start_ray(settings.ray)
    for job in (generate_events, build_sequences, build_requests):
        job.run(settings)
    return settings


def settings_of(asked: argparse.Namespace, **train: Any) -> Settings:
    """Of a run on one worker, unless `train` says otherwise."""
    merge_size, query_groups = (8, 100) if ON_CUDA else (4, 16)
    return load_settings(
        overrides={
            "root": f"{asked.data}/{asked.width}_{asked.length}_{asked.users}_{asked.events}",
            "event_schema": {"features": [{"name": "category", "kind": "categorical", "of": "item"}]},
            "generate": {"num_users": asked.users, "num_events": asked.events, "num_items": 200_000},
            "sequences": {"keep_events": asked.events, "num_buckets": 16},
            "requests": {"negatives_per_positive": 31},
            "model": {
                "history_events": asked.length,
                "merge_size": merge_size,
                "event_width": asked.width // merge_size,
                "query_groups": query_groups,
                "stride_groups": query_groups // 2,
                "num_self_layers": 3,
                "item_rows": 2_000_000 if ON_CUDA else 20_000,
                "user_rows": 100_000 if ON_CUDA else 1_000,
            },
            "train": {
                "num_workers": 1,
                "use_gpu": ON_CUDA,
                "precision": "bf16" if ON_CUDA else "float32",
                "tokens_per_step": asked.tokens,
                "validate_every_steps": 100 if ON_CUDA else 20,
                "max_validation_requests": 1_000 if ON_CUDA else 200,
                **train,
            },
            "ray": {"num_cpus": 12 if ON_CUDA else 3},
        }
    )


def rates(records: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Impressions per second, and the share of time waiting for data, between the first of a run's records and the last."""
    first, last = records[0], records[-1]
    spent_s = last["elapsed_s"] - first["elapsed_s"]

    def since(rate: str) -> float:
        return float(last[rate] * last["elapsed_s"] - first[rate] * first["elapsed_s"]) / spent_s

    return since("impressions_per_s"), since("data_wait_share")


def _model_step(settings: Settings, num_steps: int, validates: bool = False) -> float:
    """Impressions per second of the run's own steps, from staged batches; of the first one, outputs as a validation has them."""
    _, inputs = pin_tables(settings)
    job = Job(settings, inputs)
    tables = Tables.of(job)
    content = Content(job, tables.read(range(tables.requests.num_buckets)))
    plan = content.cursor.plan(0, 1)
    num_steps = min(num_steps, content.cursor.steps_of(0))
    steps = np.linspace(0, content.cursor.steps_of(0) - 1, num_steps).astype(int)
    torch.manual_seed(settings.seed)
    model = Longer(settings.model, settings.event_schema, settings.train.tasks).to(DEVICE)
    stepper = Stepper(model, settings.train, DEVICE, 1)
    batches = [content.data.batch(content.packs.take(plan.step(step))) for step in steps]
    if validates:
        stepper.outputs(batches[0])
    counts = [int(batch.candidates.offsets_R1[-1]) for batch in batches]
    for batch in batches:  # one capture for all of them
        stepper.staged(batch)
    staged = [stepper.staged(batch) for batch in batches]
    turn = iter(range(10**9))

    def step() -> None:
        number = next(turn) % num_steps
        stepper.step([staged[number]], [1.0], counts[number])

    return float(np.mean(counts)) / seconds(step, num_steps, warm_up=3 if ON_CUDA else 1)


if __name__ == "__main__":
    main()
