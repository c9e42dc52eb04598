"""How fast training is, against plain PyTorch: python -m benchmarks.training [--width 512] [--end-to-end]

One run on one device, the same weights, data and mathematics in every arm (checked first); on a CPU a small size.

    per impression   one impression a row, histories padded to the batch's longest, dense mask, PyTorch's attention; its
                     item table has a dense gradient and AdamW, as most would write it
    shared padded    the candidates of a request share the encode; else the same; compiled on CUDA
    launched         this platform's step, kernel by kernel
    model step       this platform's step as `jobs.train` runs it: batches staged ahead, one CUDA graph, sparse table updates
    end to end       `longer.training.run.train` from Parquet through Ray Train, against `model step` on that run's own batches

Prints Markdown as it goes; last, one JSON line. Model FLOPs are those of real tokens' matrix products (`model_arms.flops`).
"""

import argparse
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.model_arms.flops import training_flops
from benchmarks.model_arms.plain import pad, padded_forward
from benchmarks.model_arms.sizes import (
    DEVICE,
    ON_CUDA,
    SCHEMA,
    TASKS,
    measured_rate,
    model_settings,
    per_impression,
    random_batch,
    seconds,
    zipf_lengths,
)
from benchmarks.model_arms.work import kernel_table
from longer.arrays import RequestBatch
from longer.model.inputs import to_tensors
from longer.model.longer import Longer
from longer.training.steps import StepBatch, Stepper, loss_sum
from longer.training_settings import TrainSettings

PER_IMPRESSION, SHARED, LAUNCHED, STEP = "per impression", "shared padded", "launched", "model step"
NUM_CANDIDATES = 32


def main() -> None:
    asked = _options()
    torch._dynamo.config.recompile_limit = (
        64  # one process measures many models, and a piece beyond the limit is not compiled
    )
    worst = check_arms_agree()
    device = torch.cuda.get_device_name() if ON_CUDA else "CPU"
    print(
        f"# Training speed\n\n{device}; torch {torch.__version__}; float32 outputs of the arms differ by {worst:.1e} at most"
    )
    rate = measured_rate()
    print(f"matrix products: {rate / 1e12:.3g} TFLOP/s\n", flush=True)
    rows: list[dict[str, Any]] = []
    for event_width, longest in asked.sizes:
        for is_zipf in (True, False) if asked.full else (True,):
            size = Size(event_width, longest, is_zipf)
            rows += size.rows([arm for arm in asked.arms if is_zipf or arm != PER_IMPRESSION], rate)
    if rows:
        _print_table(rows)
    precision = precision_arms(*asked.sizes[-1]) if asked.precision else {}
    if asked.profile:
        size = Size(*asked.sizes[-1], True)
        step = size.our_step(size.stepper(), is_staged=True)
        print(kernel_table(lambda: step(0)), flush=True)
    end_to_end = _end_to_end(asked) if asked.end_to_end else {}
    print(json.dumps(summary(rows, precision, end_to_end)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, choices=[256, 512], action="append", help="D (default: both)")
    parser.add_argument("--length", type=int, choices=[2_000, 10_000], action="append", help="L (default: both)")
    parser.add_argument("--arm", action="append", choices=[PER_IMPRESSION, SHARED, LAUNCHED, STEP], help="default: all")
    parser.add_argument("--no-arms", action="store_true", help="only what the flags below ask for")
    parser.add_argument("--full", action="store_true", help="full histories too, not Zipf lengths only")
    parser.add_argument("--precision", action="store_true", help="bf16 with recomputation against float32 without")
    parser.add_argument("--profile", action="store_true", help="where the last size's step goes, by kind of kernel")
    parser.add_argument(
        "--end-to-end", action="store_true", help="from Parquet through Ray Train, which must be installed"
    )
    asked = parser.parse_args()
    widths, lengths = asked.width or [256, 512], asked.length or [2_000, 10_000]
    asked.sizes = [(width // 8, longest) for width in widths for longest in lengths] if ON_CUDA else [(8, 256)]
    asked.arms = [] if asked.no_arms else asked.arm or [STEP, LAUNCHED, SHARED, PER_IMPRESSION]
    return asked


def autocast() -> torch.autocast:
    """The flags that the Stepper has: compiled functions are compiled once for each."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_CUDA, cache_enabled=False)


class Size:
    """Three batches of one size, and a step of each arm on them."""

    def __init__(self, event_width: int, longest: int, is_zipf: bool) -> None:
        rng, self.longest, self.is_zipf = np.random.default_rng(1), longest, is_zipf
        self.settings = model_settings(event_width, longest, small=not ON_CUDA)
        self.num_users = (512 if longest <= 2_000 else 128) if ON_CUDA else 8
        self.num_impressions = self.num_users * NUM_CANDIDATES
        self.lengths = [
            zipf_lengths(rng, self.num_users, longest) if is_zipf else np.full(self.num_users, longest)
            for _ in range(3)
        ]
        self.batches = [random_batch(rng, lengths, NUM_CANDIDATES) for lengths in self.lengths]

    def rows(self, arms: list[str], rate: float) -> list[dict[str, Any]]:
        rows = []
        for arm in arms:
            try:
                row = self._row(arm, rate)
            except torch.OutOfMemoryError:
                print(f"out of memory: {arm}, {self.num_users} users of up to {self.longest} events", file=sys.stderr)
                continue
            print(f"{row['width']} {row['L']} {row['lengths']} {arm}: {row['ms_per_step']:.2f} ms, "
                  f"{row['impressions_per_s']:,.0f}/s, MFU {row['mfu']:.3f}", file=sys.stderr, flush=True)  # fmt: skip
            rows.append(row)
        return rows

    def stepper(self, **train: Any) -> Stepper:
        torch.manual_seed(0)
        model = Longer(self.settings, SCHEMA, TASKS).to(DEVICE)
        settings = TrainSettings(**{"tasks": TASKS, "precision": "bf16" if ON_CUDA else "float32", **train})
        return Stepper(model, settings, DEVICE, 1)

    def _row(self, arm: str, rate: float) -> dict[str, Any]:
        if arm in (STEP, LAUNCHED):
            step, impressions = self.our_step(self.stepper(), is_staged=arm == STEP), self.num_impressions
        else:
            step, impressions = self._plain_step(is_shared=arm == SHARED)
        turn = iter(range(10**9))
        stance = "force_eager" if arm == PER_IMPRESSION else "default"  # plain code gets none of our compiled pieces
        with torch.compiler.set_stance(stance):
            step_s = seconds(lambda: step(next(turn) % 3), 20 if ON_CUDA else 2, 6 if ON_CUDA else 1)
        if arm == PER_IMPRESSION:
            flops = [training_flops(self.settings, b.history_end_R, 1) for b in self._few()]
        else:
            flops = [training_flops(self.settings, lengths, NUM_CANDIDATES) for lengths in self.lengths]
        return {
            "width": self.settings.width, "L": self.longest, "lengths": "Zipf" if self.is_zipf else "full", "arm": arm,
            "impressions_per_step": impressions, "ms_per_step": step_s * 1e3, "impressions_per_s": impressions / step_s,
            "GFLOP_per_step": float(np.mean(flops)) / 1e9, "model_tflops": float(np.mean(flops)) / step_s / 1e12,
            "mfu": float(np.mean(flops)) / step_s / rate,
        }  # fmt: skip

    def our_step(self, stepper: Stepper, is_staged: bool) -> Callable[[int], Any]:
        ready: list[StepBatch] = list(self.batches)
        if is_staged:
            for batch in self.batches:  # so that one capture holds them all
                stepper.staged(batch)
            ready = [stepper.staged(batch) for batch in self.batches]
        return lambda number: stepper.step([ready[number]], [1.0], self.num_impressions)

    def _few(self) -> list[RequestBatch]:
        return [per_impression(batch, max(32, self.num_users // 4)) for batch in self.batches]

    def _plain_step(self, is_shared: bool) -> tuple[Callable[[int], Any], int]:
        torch.manual_seed(0)
        model, train = Longer(self.settings, SCHEMA, TASKS).to(DEVICE), TrainSettings()
        optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate, fused=True)
        padded = [pad(model, batch) for batch in (self.batches if is_shared else self._few())]
        forward = torch.compile(padded_forward, dynamic=False) if is_shared and ON_CUDA else padded_forward
        num_query_groups = self.settings.query_groups + self.settings.stride_groups

        def step(number: int) -> None:
            with autocast():
                output_CT = forward(model, padded[number], num_query_groups)
            optimizer.zero_grad(set_to_none=True)
            (loss_sum(output_CT, padded[number].labels, TASKS) / len(output_CT)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
            optimizer.step()

        return step, len(padded[0].candidates["item_id"])


def check_arms_agree() -> float:
    """The largest difference of the arms' float32 outputs on a small batch; fails if they compute different things."""
    torch.manual_seed(0)
    model = Longer(model_settings(8, 64, small=True), SCHEMA, TASKS).to(DEVICE).eval()
    batch = random_batch(np.random.default_rng(0), np.array([1, 7, 64, 60, 33, 50]), 5)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        ours = model(to_tensors(batch, DEVICE))
        shared = padded_forward(model, pad(model, batch), 24)
        alone = padded_forward(model, pad(model, per_impression(batch, 30)), 24)
    worst = max(float((ours - other).abs().max()) for other in (shared, alone))
    if worst > 1e-3:
        raise SystemExit(f"the arms compute different outputs: {worst:.1e} apart")
    return worst


PLAIN, RECOMPUTED = "float32", "bf16, recomputed"
PRECISIONS = {
    RECOMPUTED: {"precision": "bf16", "recompute": True},
    PLAIN: {"precision": "float32"},
    "bf16": {"precision": "bf16"},
    "tf32": {"precision": "tf32"},
    "fp16": {"precision": "fp16"},
}


def precision_arms(event_width: int, longest: int) -> dict[str, Any]:
    """A step's speed and memory: bf16 with recomputation, float32 without (the paper's comparison), and what lies between."""
    size, rows = Size(event_width, longest, True), {}
    print(
        f"\nwidth {size.settings.width}, L = {longest}. Held: weights, moments, gradients, the captured pass and a step's own. "
        "Of the pass: the most that its tensors took at once while it was captured, beyond weights and moments\n\n"
        "| precision | ms/step | GB held | GB of the pass |\n|---|---|---|---|",
        flush=True,
    )
    for name in PRECISIONS if ON_CUDA else (RECOMPUTED, PLAIN):
        rows[name] = row = _precision_row(size, PRECISIONS[name])
        print(f"| {name} | {row['ms_per_step']:.2f} | {row['held_gb']:.3f} | {row['pass_gb']:.3f} |", flush=True)
    ours, theirs = rows[RECOMPUTED], rows[PLAIN]
    return {
        "amp_recompute_speedup": theirs["ms_per_step"] / ours["ms_per_step"],
        "amp_recompute_memory": ours["held_gb"] / theirs["held_gb"] if ON_CUDA else None,
    }


def _precision_row(size: Size, train: dict[str, Any]) -> dict[str, float]:
    """A stepper of these settings, alone on the device; nothing is told of a CPU's memory."""
    gc.collect()  # a stepper is part of cycles: the one before would be counted
    if not ON_CUDA:
        step_s = _seconds_of(size.our_step(size.stepper(**train), is_staged=True))
        return {"ms_per_step": step_s * 1e3, "held_gb": math.nan, "pass_gb": math.nan}
    torch.cuda.empty_cache()
    step = size.our_step(size.stepper(**train), is_staged=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(0)  # captures
    pass_bytes = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step_s = _seconds_of(step)
    return {"ms_per_step": step_s * 1e3, "held_gb": torch.cuda.max_memory_reserved() / 1e9, "pass_gb": pass_bytes / 1e9}


def _seconds_of(step: Callable[[int], Any]) -> float:
    turn = iter(range(10**9))
    return seconds(lambda: step(next(turn) % 3), 10 if ON_CUDA else 2, 3 if ON_CUDA else 1)


def _end_to_end(asked: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own for each width: Ray's workers want the device that this one has."""
    torch.cuda.empty_cache()
    shares = {}
    for width in sorted({event_width * 8 for event_width, _ in asked.sizes}):
        command = [sys.executable, "-m", "benchmarks.end_to_end", "--width", str(width if ON_CUDA else 32)]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        print("\n".join(lines[:-1]), flush=True)
        shares[str(width)] = json.loads(lines[-1])
    return shares


def _print_table(rows: list[dict[str, Any]]) -> None:
    def shown(value: Any) -> str:
        return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") if isinstance(value, float) else str(value)

    lines = [" | ".join(rows[0]), "|".join("---" for _ in rows[0])]
    print(
        "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(map(shown, row.values())) for row in rows)]),
        "\n",
        flush=True,
    )


def summary(rows: list[dict[str, Any]], precision: dict[str, Any], end_to_end: dict[str, Any]) -> dict[str, Any]:
    speed: dict[str, dict[str, float]] = {}
    mfu = {}
    for row in rows:
        size = f"width{row['width']}_L{row['L']}_{row['lengths'].lower()}"
        speed.setdefault(size, {})[row["arm"]] = round(row["impressions_per_s"])
        if row["arm"] == STEP:
            mfu[size] = round(row["mfu"], 3)

    def ratios(other: str) -> dict[str, float]:
        return {size: round(arms[STEP] / arms[other], 2) for size, arms in speed.items() if {STEP, other} <= set(arms)}

    return {
        "impressions_per_s": speed,
        "vs_per_impression": ratios(PER_IMPRESSION),
        "vs_shared_padded": ratios(SHARED),
        "mfu": mfu,
        **{key: {width: e[key] for width, e in end_to_end.items()} for key in ("end_to_end_share", "data_wait_share")},
        **precision,
    }


if __name__ == "__main__":
    main()
