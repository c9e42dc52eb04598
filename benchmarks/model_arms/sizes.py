"""The model's sizes in the speed benchmarks, random batches of them, and how long things take.

B requests of one history each, L events, C candidates of a request, d event width, D width.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from longer.arrays import NO_EVENT_TS, Candidates, Histories, RequestBatch
from longer.model_settings import ModelSettings
from longer.schema import EventSchema, Feature
from longer.training_settings import TaskSettings

SCHEMA = EventSchema(features=(Feature(name="category", kind="categorical", of="item"),), tasks=("click",))
TASKS = (TaskSettings(name="click"),)
NOW = 1_700_000_000_000
ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")


def model_settings(event_width: int, history_events: int, small: bool = False) -> ModelSettings:
    if small:
        return ModelSettings(
            history_events=history_events,
            merge_size=4,
            event_width=event_width,
            query_groups=16,
            stride_groups=8,
            item_rows=5_000,
        )
    return ModelSettings(
        history_events=history_events,
        merge_size=8,
        event_width=event_width,
        query_groups=100,
        stride_groups=25 if history_events == 1_000 else 50,  # 1,000 events are not a multiple of 50 groups of 8
        num_heads=4,
        num_self_layers=3,
        item_rows=2_000_000,
        user_rows=100_000,
    )


def zipf_lengths(rng: np.random.Generator, num_users: int, longest: int) -> np.ndarray:
    """P(length > x) = x0/x from x0 = longest/20 on, cut at `longest`, which one user of the batch has: the mean is a fifth."""
    lengths = np.minimum(longest, longest / 20 / (1 - rng.random(num_users))).astype(np.int64)
    lengths[rng.integers(num_users)] = longest
    return lengths


def random_batch(rng: np.random.Generator, lengths: np.ndarray, num_candidates: int) -> RequestBatch:
    """One request a user, at the end of a history that starts at event 0."""
    total, num_users = int(lengths.sum()), len(lengths)
    offsets = np.append(0, np.cumsum(lengths))

    def keys(n: int, rows: int) -> np.ndarray:
        return (rows / (1 + rng.random(n) * rows)).astype(np.int64) * 7_919 + 1  # few popular ones, many rare ones

    events = {"item_id": keys(total, 2_000_000), "action": keys(total, 4), "category": keys(total, 2_000)}
    asked = num_users * num_candidates
    candidates = {"item_id": keys(asked, 2_000_000), "category": keys(asked, 2_000)}
    event_ts = NOW - 1_000_000_000 + np.sort(rng.integers(0, 10**9, total))
    rows = np.arange(num_users)
    return RequestBatch(
        Histories(rng.integers(1, 2**62, num_users), offsets, rows * 0, rows * 0 + NO_EVENT_TS, event_ts, events),
        rows,
        lengths,
        rows * 0 + NOW + 1000,
        Candidates(np.arange(num_users + 1) * num_candidates, candidates),
        rows,
        {"click": rng.integers(0, 2, asked).astype(np.float32)},
    )


def per_impression(batch: RequestBatch, num_rows: int) -> RequestBatch:
    """So many impressions of the batch, or all, spread evenly over its users, each with a copy of its history."""
    user_C = np.repeat(batch.row_R, np.diff(batch.candidates.offsets_R1))
    rows = np.arange(min(num_rows, len(user_C)))
    taken_N = rows * len(user_C) // len(rows)
    user_N = user_C[taken_N]
    starts = batch.histories.first_index_B[user_N]
    return RequestBatch(
        batch.histories.slice_events(user_N, starts, batch.history_end_R[user_N]),
        rows,
        batch.history_end_R[user_N],
        batch.request_ts_R[user_N],
        Candidates(np.arange(len(rows) + 1), {n: x[taken_N] for n, x in batch.candidates.features.items()}),
        rows,
        {name: x[taken_N] for name, x in batch.labels.items()},
    )


def measured_rate() -> float:
    """FLOP/s of the device's own product of bfloat16 matrices (float32 on a CPU)."""
    size, dtype = (8192, torch.bfloat16) if ON_CUDA else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, 20)


def seconds(step: Callable[[], Any], num_steps: int, warm_up: int = 3) -> float:
    """Seconds a step, over `num_steps` steps without waiting in between."""
    for _ in range(warm_up):
        step()
    if ON_CUDA:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(num_steps):
        step()
    if ON_CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / num_steps
