"""The arms of `benchmarks.training`: one training step each of the same model, on the same batches.

    per impression   one impression a row, histories padded to the batch's longest, dense mask, PyTorch's attention; its
                     item table has a dense gradient and AdamW, as most would write it
    shared padded    the candidates of a request share the encode; else the same; compiled on CUDA
    launched         this platform's step, kernel by kernel
    model step       this platform's step as `jobs.train` runs it: batches staged ahead, CUDA graphs, sparse table updates

The plain arms have what speeds up embedding vectors everywhere: small tables' gradients without contention.
"""

import gc
import math
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
_MOST_IMPRESSIONS = 128
"""Of a step of the arm that computes a history for each."""

torch._dynamo.config.recompile_limit = (
    64  # a process measures many models, and a piece beyond the limit is not compiled
)


def free_memory() -> None:
    """Of the step before: a stepper is part of cycles, and would be counted."""
    gc.collect()
    if ON_CUDA:
        torch.cuda.empty_cache()


def autocast() -> torch.autocast:
    """The flags that the Stepper has: compiled functions are compiled once for each."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_CUDA, cache_enabled=False)


class Size:
    """Three batches of one size, and a step of each arm on them."""

    def __init__(self, event_width: int, longest: int, is_zipf: bool, num_users: int | None = None) -> None:
        rng, self.longest, self.is_zipf = np.random.default_rng(1), longest, is_zipf
        self.settings = model_settings(event_width, longest, small=not ON_CUDA)
        self.num_users = num_users or ((512 if longest <= 2_000 else 128) if ON_CUDA else 8)
        self.num_impressions = self.num_users * NUM_CANDIDATES
        self.lengths = [
            zipf_lengths(rng, self.num_users, longest) if is_zipf else np.full(self.num_users, longest)
            for _ in range(3)
        ]
        self.batches = [random_batch(rng, lengths, NUM_CANDIDATES) for lengths in self.lengths]

    def stepper(self, **train: Any) -> Stepper:
        torch.manual_seed(0)
        model = Longer(self.settings, SCHEMA, TASKS).to(DEVICE)
        settings = TrainSettings(**{"tasks": TASKS, "precision": "bf16" if ON_CUDA else "float32", **train})
        return Stepper(model, settings, DEVICE, 1)

    def row(self, arm: str, rate: float) -> dict[str, Any]:
        """What an arm does on a device that multiplies matrices at `rate` FLOP/s."""
        if arm in (STEP, LAUNCHED):
            step, impressions = self.our_step(self.stepper(), is_staged=arm == STEP), self.num_impressions
        else:
            step, impressions = self.plain_step(is_shared=arm == SHARED)
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
        return [per_impression(batch, _MOST_IMPRESSIONS) for batch in self.batches]

    def plain_step(self, is_shared: bool) -> tuple[Callable[[int], Any], int]:
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")  # what autocast leaves in float32, as our step has it
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
    "bf16": {"precision": "bf16"},
    PLAIN: {"precision": "float32"},
    "tf32": {"precision": "tf32"},
    "fp16": {"precision": "fp16"},
}


def precision_row(event_width: int, longest: int, name: str) -> dict[str, float]:
    """A step's speed and memory, in a process that holds nothing else; nothing is told of a CPU's memory."""
    free_memory()
    size = Size(event_width, longest, True)
    step = size.our_step(size.stepper(**PRECISIONS[name]), is_staged=True)
    if not ON_CUDA:
        return {"ms_per_step": _seconds_of(step) * 1e3, "held_gb": math.nan, "pass_gb": math.nan}
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


def compile_only(event_width: int, longest: int, what: str) -> None:
    """One step of an arm or of a precision, for what it leaves in this process and in the compiler's caches on disk."""
    size = Size(event_width, longest, True)
    if what == SHARED:
        size.plain_step(is_shared=True)[0](0)
    else:
        size.our_step(size.stepper(**PRECISIONS.get(what, {})), is_staged=True)(0)
    del size
    free_memory()


def measured_row(
    event_width: int, longest: int, is_zipf: bool, num_users: int | None, arm: str, rate: float
) -> dict[str, Any]:
    """`Size.row`; the device's memory is free before and after."""
    free_memory()
    row = Size(event_width, longest, is_zipf, num_users).row(arm, rate)
    free_memory()
    return row


def profiled_step(event_width: int, longest: int, num_users: int | None) -> str:
    """Where the time of a model step goes, as Markdown."""
    free_memory()
    size = Size(event_width, longest, True, num_users)
    step = size.our_step(size.stepper(), is_staged=True)
    return kernel_table(lambda: step(0))
