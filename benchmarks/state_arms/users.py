"""Users with full windows in a pool on the device, and the ways to encode, append and score them."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.model_arms.sizes import DEVICE, ON_CUDA, SCHEMA, TASKS, random_batch, seconds
from longer.arrays import Candidates, Histories, Int64, RequestBatch
from longer.model.engine import StateEngine
from longer.model.fuse import plainly
from longer.model.inputs import to_tensors
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.state_layout import Precision, StateLayout
from longer.model.states import UserState, append, encode, score
from longer.model_settings import ModelSettings
from longer.slots import Slot

NUM_ROUNDS = 5

torch._dynamo.config.recompile_limit = (
    64  # one process measures many sizes, and a piece beyond the limit is not compiled
)


@dataclass(frozen=True)
class Way:
    """How states are made and read: the functions of `model.states` without the model and the pool."""

    name: str
    encode: Callable[[Histories, Sequence[Slot]], list[UserState]]
    append: Callable[[Sequence[UserState], Histories, Sequence[Slot]], list[UserState]]
    score: Callable[[Sequence[UserState], Int64, Candidates], np.ndarray]
    num_steps: int
    """Steps of a round: enough that the clock's own cost does not show."""


def ways(model: Longer, pool: StatePool) -> list[Way]:
    """Kernel by kernel, and on CUDA as serving runs it."""
    functions = (partial(function, model, pool) for function in (encode, append, score))
    eager, engine = Way("eager", *functions, num_steps=2), StateEngine(model, pool)
    return [eager, Way("graph", engine.encode, engine.append, engine.score, num_steps=10)] if ON_CUDA else [eager]


class Users:
    """Users with full windows and their next events, a pool with room for their states, and the model."""

    def __init__(self, settings: ModelSettings, num_users: int, precision: Precision) -> None:
        torch.manual_seed(0)
        self.settings, self.rng = settings, np.random.default_rng(2)
        self.model = Longer(settings, SCHEMA, TASKS).to(DEVICE).eval()
        self.num_events = settings.history_events
        num_all = self.num_events + 2 * settings.windows.stride_events
        self.histories = random_batch(self.rng, np.full(num_users, num_all), 1).histories
        layout = StateLayout.of(self.model, precision)
        self.state_bytes = layout.largest_rows * layout.row_bytes
        self.pool = StatePool(layout, (num_users + 2) * self.state_bytes, DEVICE)
        self.ways = ways(self.model, self.pool)

    @property
    def served(self) -> Way:
        """As serving runs it on this device."""
        return self.ways[-1]

    def events(self, num_users: int, begin: int, end: int) -> Histories:
        return self.histories.slice_events(np.arange(num_users), np.full(num_users, begin), np.full(num_users, end))

    def slots(self, num_users: int) -> list[Slot]:
        """Of the largest size, so that no state outgrows its own; all of the pool is free before."""
        found = [self.pool.slots.allocate(self.pool.layout.largest_rows) for _ in range(num_users)]
        return [slot for slot in found if slot is not None]

    def free(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self.pool.slots.free(slot)

    def asked(self, num_users: int, num_candidates: int) -> RequestBatch:
        return random_batch(self.rng, np.ones(num_users, np.int64), num_candidates)

    def request(self, asked: RequestBatch, end: int) -> RequestBatch:
        """What `asked` asks, about histories of `end` events."""
        num_users = asked.num_requests
        start = int(self.model.windows.history_start(end)) * self.settings.merge_size
        return RequestBatch(
            self.events(num_users, start, end),
            asked.row_R,
            np.full(num_users, end),
            asked.request_ts_R,
            asked.candidates,
            asked.request_id_R,
        )


def rounds_ms(step: Callable[[], Any], num_steps: int, num_rounds: int = NUM_ROUNDS) -> dict[str, float]:
    """Milliseconds a step: median, least and most of rounds of `num_steps` steps, after one step that compiles and captures."""
    started = time.perf_counter()
    step()
    first_s = time.perf_counter() - started
    return spread([1e3 * seconds(step, num_steps, warm_up=0) for _ in range(num_rounds)]) | {"first_s": first_s}


def spread(values_ms: Sequence[float]) -> dict[str, float]:
    return {"ms": float(np.median(values_ms)), "least_ms": min(values_ms), "most_ms": max(values_ms)}


def worst_difference(users: Users, way: Way, num_users: int, num_candidates: int = 16) -> float:
    """The largest difference of probabilities, computed this way, from the float64 forward pass over the whole history.

    The states are encoded, then appended to over a stride and its move, by a number of events that no group's size divides.
    """
    windows, step = users.model.windows, 3 * users.settings.merge_size + 1
    ends = range(users.num_events, users.num_events + windows.stride_events + step, step)
    asked = users.asked(num_users, num_candidates)
    slots = users.slots(num_users)
    states = way.encode(users.events(num_users, 0, ends[0]), slots)
    for begin in ends[:-1]:
        states = way.append(states, users.events(num_users, begin, begin + step), slots)
    outputs = way.score(states, asked.request_ts_R, asked.candidates)
    users.free(slots)
    exact_model = copy.deepcopy(users.model).double()
    with torch.inference_mode(), plainly():  # what has no floats would be compiled here too
        exact = exact_model(to_tensors(users.request(asked, ends[-1]), DEVICE)).sigmoid().cpu()
    return float((torch.from_numpy(outputs).double().sigmoid() - exact).abs().max())
