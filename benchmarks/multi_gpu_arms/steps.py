"""The model step on 1, 2, 4 and 8 devices, weak scaling: python -m benchmarks.multi_gpu_arms.steps [--worlds 1 2 4]

One process a device, over NCCL (gloo on a CPU). Every number of devices trains on the same lengths, Zipf, so many users a device:

    balanced          the platform's step: users divided by tokens, tables on every device
    no exchange       the same without the sum of gradients: what the exchange costs, waiting for the slowest included
    by request count  users of the same steps, which the platform makes of equal tokens, divided into equal numbers instead
    fixed users       as many users in every step and on every device, in any order, as trainers do that count rows
    sharded rows      balanced, the rows of large tables spread over the devices

A step's time is that of the slowest device. Prints Markdown; last, one JSON line.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.model_arms.sizes import ON_CUDA, SCHEMA, TASKS, model_settings, random_batch, seconds, zipf_lengths
from longer.arrays import Int64
from longer.model.longer import Longer
from longer.training.cursor import DataCursor
from longer.training.steps import Stepper
from longer.training_settings import TrainSettings

BALANCED, NO_EXCHANGE, BY_COUNT, ROWS = "balanced", "no exchange", "by request count", "sharded rows"
FIXED_USERS = "fixed users"
NUM_CANDIDATES = 32
NUM_BATCHES = 4
"""Steps that are prepared and then taken in turn."""


class Size(NamedTuple):
    """Histories of at most `longest` events; so many users a device and step."""

    event_width: int
    longest: int
    users: int

    @property
    def name(self) -> str:
        return f"L{self.longest}_{self.users}"


SIZES = [Size(64, 2_000, 512), Size(64, 10_000, 128), Size(64, 10_000, 32)] if ON_CUDA else [Size(8, 256, 32)]


@dataclass
class Row:
    """One arm of one size on so many devices; `imbalance` is the costliest device's tokens over the mean."""

    size: str
    num_devices: int
    arm: str
    step_ms: float
    impressions_per_s: float
    imbalance: float
    peak_gb: float
    losses: list[float]


def divided(lengths: Int64, num_devices: int, arm: str) -> list[list[Int64]]:
    """The lengths of each device in each of `NUM_BATCHES` steps.

    Steps are of about equal cost and divided by the platform's cursor, or by number, or steps are of equal numbers, too.
    """
    every = np.tile(lengths, num_devices)
    if arm == FIXED_USERS:
        parts = np.array_split(np.random.default_rng(2).permutation(every), NUM_BATCHES * num_devices)
        return [parts[step * num_devices :][:num_devices] for step in range(NUM_BATCHES)]
    cost = every + NUM_CANDIDATES
    budget = -(-int(cost.sum()) // NUM_BATCHES) + int(cost.max())
    plan = DataCursor("multi_gpu", cost, [np.arange(len(cost))], budget).plan(0, num_devices)
    steps = []
    for step in range(NUM_BATCHES):
        parts = [plan.batch(step, device) for device in range(num_devices)]
        if arm == BY_COUNT:
            parts = np.array_split(np.sort(plan.step(step)), num_devices)
        steps.append([every[part] for part in parts])
    return steps


def imbalance(steps: Sequence[Sequence[Int64]]) -> float:
    """The most tokens of a device over the mean, averaged over steps."""
    tokens_SN = np.array([[int((part + NUM_CANDIDATES).sum()) for part in parts] for parts in steps])
    return float((tokens_SN.max(axis=1) / tokens_SN.mean(axis=1)).mean())


class Device:
    """One process's part of every arm."""

    def __init__(self, device: torch.device, rank: int, num_devices: int, size: Size, num_steps: int) -> None:
        self.device, self.rank, self.num_devices, self.size, self.num_steps = device, rank, num_devices, size, num_steps
        rng = np.random.default_rng(1)
        self.lengths = zipf_lengths(rng, size.users * NUM_BATCHES, size.longest)

    def rows(self) -> list[Row]:
        balanced, by_count, fixed = (
            divided(self.lengths, self.num_devices, arm) for arm in (BALANCED, BY_COUNT, FIXED_USERS)
        )
        stepper = self._stepper("replicated")
        rows = [self._row(BALANCED, stepper, balanced)]
        if self.num_devices == 1:
            return rows
        exchange, stepper.optimizer.exchange = stepper.optimizer.exchange, None
        rows.append(self._row(NO_EXCHANGE, stepper, balanced))
        stepper.optimizer.exchange = exchange
        rows.append(self._row(BY_COUNT, stepper, by_count))
        rows.append(self._row(FIXED_USERS, stepper, fixed))
        del stepper
        rows.append(self._row(ROWS, self._stepper("rows"), balanced))
        return rows

    def _stepper(self, sharding: str) -> Stepper:
        if ON_CUDA:
            torch.cuda.empty_cache()
        torch.manual_seed(0)
        with self.device:  # where a table of this size is made much sooner
            model = Longer(model_settings(self.size.event_width, self.size.longest, small=not ON_CUDA), SCHEMA, TASKS)
        settings = TrainSettings(tasks=TASKS, precision="bf16" if ON_CUDA else "float32", table_sharding=sharding)
        return Stepper(model, settings, self.device, self.num_devices)

    def _row(self, arm: str, stepper: Stepper, steps: list[list[Int64]]) -> Row:
        if ON_CUDA:
            torch.cuda.reset_peak_memory_stats()
        batches = [
            random_batch(np.random.default_rng([number, self.rank]), parts[self.rank], NUM_CANDIDATES)
            for number, parts in enumerate(steps)
        ]
        for batch in batches:  # so that one capture holds them all
            stepper.staged(batch)
        staged = [stepper.staged(batch) for batch in batches]
        counts = [sum(map(len, parts)) * NUM_CANDIDATES for parts in steps]

        def step(number: int) -> float:
            loss, _ = stepper.step([staged[number]], [1.0], counts[number])
            return loss

        first = [self._over_devices(float(step(number)), sum) / counts[number] for number in range(NUM_BATCHES)]
        turn = iter(range(10**9))
        self._over_devices(0.0, max)  # all start together
        step_s = self._over_devices(
            seconds(lambda: step(next(turn) % NUM_BATCHES), self.num_steps, warm_up=NUM_BATCHES), max
        )
        peak_gb = torch.cuda.max_memory_allocated() / 1e9 if ON_CUDA else 0.0
        rate = float(np.mean(counts)) / step_s
        row = Row(self.size.name, self.num_devices, arm, step_s * 1e3, rate, imbalance(steps), peak_gb, first)
        if self.rank == 0 and self.num_steps > 1:
            print(
                f"{row.size} on {row.num_devices}, {arm}: {row.step_ms:.2f} ms, {rate:,.0f}/s",
                file=sys.stderr,
                flush=True,
            )
        return row

    def _over_devices(self, value: float, combine: Callable[[list[float]], float]) -> float:
        values = [value] * self.num_devices
        if self.num_devices > 1:
            dist.all_gather_object(values, value)
        return combine(values)


def device_process(rank: int, asked: argparse.Namespace, folder: str, barrier: Barrier, out: Any) -> None:
    """Takes part wherever its device does, after all have compiled what they need."""
    torch._dynamo.config.recompile_limit = 64  # each arm's model counts
    device = torch.device("cuda", rank) if ON_CUDA else torch.device("cpu")
    if ON_CUDA:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    Device(device, 0, 1, asked.sizes[0], num_steps=1).rows()
    barrier.wait()
    for size, num_devices in itertools.product(asked.sizes, sorted(asked.worlds)):
        if rank < num_devices:
            meet = f"file://{folder}/{size.name}_{num_devices}"
            if num_devices > 1:
                dist.init_process_group("nccl" if ON_CUDA else "gloo", meet, rank=rank, world_size=num_devices)
            rows = Device(device, rank, num_devices, size, asked.steps).rows()
            if rank == 0:
                out.put(rows)
            if num_devices > 1:
                dist.destroy_process_group()
        barrier.wait()


def measured(asked: argparse.Namespace) -> list[Row]:
    """Every arm, or those that were measured within `asked.seconds`."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    most, context = max(asked.worlds), torch.multiprocessing.get_context("spawn")
    barrier, out = context.Barrier(most), context.SimpleQueue()
    rows: list[Row] = []
    deadline = time.monotonic() + asked.seconds
    with tempfile.TemporaryDirectory() as folder:
        running = torch.multiprocessing.spawn(device_process, (asked, folder, barrier, out), nprocs=most, join=False)
        while not running.join(timeout=0.2):  # raises what a process raised
            while not out.empty():
                rows += out.get()
            if time.monotonic() > deadline:
                print(f"cut off after {asked.seconds:.0f} s", file=sys.stderr)
                for process in running.processes:
                    process.kill()
                return rows
    while not out.empty():
        rows += out.get()
    return rows


def page(rows: list[Row]) -> str:
    lines = [
        "| size | devices | arm | ms/step | impressions/s | costliest over mean | peak GB | largest difference of a loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = {(row.size, row.num_devices): row for row in reversed(rows)}
    for row in rows:
        apart = max(abs(a / b - 1) for a, b in zip(row.losses, first[row.size, row.num_devices].losses, strict=True))
        shown = f"{apart:.1e}" if row.arm == ROWS else ""
        lines.append(
            f"| {row.size} | {row.num_devices} | {row.arm} | {row.step_ms:.2f} | {row.impressions_per_s:,.0f} | "
            f"{row.imbalance:.2f} | {row.peak_gb:.2f} | {shown} |"
        )
    return "\n".join(lines)


def summary(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """By size and number of devices; efficiencies are against one device, the exchange's share is of the step's time."""
    at = {(row.size, row.num_devices, row.arm): row for row in rows}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (size, num, arm), row in at.items():
        if num == 1 or arm != BALANCED:
            continue
        others = (BY_COUNT, FIXED_USERS, NO_EXCHANGE, ROWS)
        by_count, fixed, alone, sharded = (at[size, num, other] for other in others)
        values = {
            "balancing_gain": row.impressions_per_s / by_count.impressions_per_s,
            "balancing_gain_over_fixed_users": row.impressions_per_s / fixed.impressions_per_s,
            "all_reduce_share": 1 - alone.step_ms / row.step_ms,
            "sharded_vs_replicated": sharded.impressions_per_s / row.impressions_per_s,
        }
        if one := at.get((size, 1, BALANCED)):
            values["weak_scaling_efficiency"] = row.impressions_per_s / (num * one.impressions_per_s)
            values["by_count_efficiency"] = by_count.impressions_per_s / (num * one.impressions_per_s)
        for key, value in values.items():
            found.setdefault(key, {}).setdefault(size, {})[str(num)] = round(value, 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    num_devices = torch.cuda.device_count() if ON_CUDA else 2
    worlds = [world for world in (1, 2, 4, 8) if world <= num_devices]
    parser.add_argument("--worlds", type=int, nargs="+", default=worlds, help="numbers of devices (default: all)")
    parser.add_argument(
        "--steps", type=int, default=16 if ON_CUDA else 4, help="steps of a measurement, a multiple of 4"
    )
    parser.add_argument(
        "--seconds", type=float, default=600, help="what is not measured by then is left out (default 600)"
    )
    parser.add_argument("--size", action="append", choices=[size.name for size in SIZES], help="default: all")
    asked = parser.parse_args()
    asked.sizes = [size for size in SIZES if not asked.size or size.name in asked.size]
    rows = measured(asked)
    print(f"\n## The model step\n\n{page(rows)}\n")
    print(json.dumps({**summary(rows), "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
