"""What a batch of states costs: recomputed, encoded, appended to, hit on the device, hit in host memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.model_arms.sizes import DEVICE, ON_CUDA, per_impression, seconds
from benchmarks.state_arms.users import NUM_ROUNDS, Users, Way, rounds_ms, spread, ways
from longer.arrays import Candidates, RequestBatch
from longer.model.flat import flat_outputs
from longer.model.inputs import tensors_of, to_tensors
from longer.model.layout import flatten
from longer.model.longer import Longer
from longer.model.pinned import pinned_words
from longer.serving.cache import Entry, Known, StateVersion
from longer.serving.fingerprint import EventPrint
from longer.serving.store import StateStore

Row = dict[str, Any]

NUM_NEW = (8, 1, 64)
"""Events of an append; first what the goals ask."""

HOST_ARMS = ("host hit", "host hit, grown")

_COPIED_BYTES = 64 << 20
_BLOCK_CANDIDATES = 64
_MOST_STEPS_INSIDE = 8
_MOST_STEPS_MIXED = 16
_NUM_APPEND_ROUNDS = 7
_VERSION = StateVersion("benchmark", "schema", "appendable")
_NO_EVENTS = EventPrint(0, 0, np.zeros(1, np.uint64), np.uint64(0))


def rows_of(users: Users, way: Way, num_users: Sequence[int], num_candidates: Sequence[int]) -> Iterator[Row]:
    """Every arm of states of one width and history length, one way."""
    for count in num_users:
        what = size_of(users) | {"users": count, "way": way.name}
        asked = {candidates: users.asked(count, candidates) for candidates in num_candidates}
        for candidates, times in hits(users, way, count, asked):
            yield what | {"arm": "hit", "candidates": candidates} | times
        yield what | {"arm": "encode"} | encode(users, way, count)
        for num_new in [n for n in NUM_NEW if n < users.model.windows.stride_events]:
            yield what | {"arm": f"append {num_new}"} | append(users, way, count, num_new)
            if count > 1:
                yield what | {"arm": f"append {num_new}, mixed"} | append_mixed(users, way, count, num_new)
        for arm, candidates, times in host_hits(users, way, count, asked):
            yield what | {"arm": arm, "candidates": candidates} | times


def recompute_rows(users: Users, num_candidates: Sequence[int]) -> Iterator[Row]:
    """One user's candidates, by each way."""
    for candidates in num_candidates:
        for name, times in recompute(users, users.asked(1, candidates)):
            yield size_of(users) | {"users": 1, "candidates": candidates, "arm": "recompute", "way": name} | times


def pinned_copy_rows(users: Users) -> Iterator[Row]:
    """One on CUDA, where there is a link."""
    if ON_CUDA:
        yield size_of(users) | {"users": 1, "arm": "pinned copy", "bytes": _COPIED_BYTES} | pinned_copy()


def size_of(users: Users) -> Row:
    return {
        "width": users.settings.width,
        "L": users.num_events,
        "stride": users.model.windows.stride_events,
        "state_bytes": users.state_bytes,
    }


def pinned_copy() -> dict[str, float]:
    """Of one long stretch of pinned memory to the device: no host hit comes faster over the link."""
    host = pinned_words(_COPIED_BYTES // 8)
    there = torch.empty_like(host, device=DEVICE)
    return rounds_ms(lambda: there.copy_(host, non_blocking=True), 10)


def recompute(users: Users, asked: RequestBatch) -> Iterator[tuple[str, dict[str, float]]]:
    """One user, every candidate with a history of its own, in blocks that fit: by each way, as hits are run.

    Laid out, and on the device, before the clock starts: what a CPU needs to put 64 x 10,000 events together is not recomputation.
    """
    blocks = blocks_of(users, asked)
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_CUDA, cache_enabled=False):
        step = partial(_forward, passes_of(users.model, blocks))
        yield "eager", rounds_ms(step, 1, 3)
        if ON_CUDA:
            yield "graph", rounds_ms(_captured(step), 1, 3)


def passes_of(model: Longer, blocks: Sequence[RequestBatch]) -> list[Callable[[], torch.Tensor]]:
    """The forward pass over each block, from what lies on the device already."""
    if not ON_CUDA:
        return [partial(model, to_tensors(block, DEVICE)) for block in blocks]
    flat = [flatten(block, model.windows, model.embedding.num_globals + 1) for block in blocks]
    return [partial(flat_outputs, model, one, tensors_of(one.arrays, DEVICE)) for one in flat]


def _forward(passes: Sequence[Callable[[], torch.Tensor]]) -> None:
    for one in passes:
        one()


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """The same kernels in one replay; they have been launched before, and are compiled."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def blocks_of(users: Users, asked: RequestBatch) -> list[RequestBatch]:
    """One user's candidates, each once and with a copy of the history; the last block is what is left."""
    request = users.request(asked, users.num_events)
    num_candidates = len(asked.candidates.features["item_id"])
    bounds = [*range(0, num_candidates, _BLOCK_CANDIDATES), num_candidates]
    return [per_impression(_part(request, *span), span[1] - span[0]) for span in pairwise(bounds)]


def _part(request: RequestBatch, begin: int, end: int) -> RequestBatch:
    """One user's request with some of its candidates."""
    features = {name: values[begin:end] for name, values in request.candidates.features.items()}
    return replace(request, candidates=Candidates(np.array([0, end - begin]), features), labels={})


def encode(users: Users, way: Way, num_users: int) -> dict[str, float]:
    slots, events = users.slots(num_users), users.events(num_users, 0, users.num_events)
    times = rounds_ms(lambda: way.encode(events, slots), way.num_steps)
    users.free(slots)
    return times


def append(users: Users, way: Way, num_users: int, num_new: int) -> dict[str, float]:
    """An append's mean over a stride: steps inside it (`inside_ms`) and the one that moves windows (`move_ms`), by their shares.

    States grow in place, as in serving; each round starts from states encoded anew, which is not counted.
    """
    windows, size = users.model.windows, users.settings.merge_size
    num_inside = min(_MOST_STEPS_INSIDE, (windows.stride_events - size) // num_new)
    boundary = (users.num_events // windows.stride_events + 1) * windows.stride_events - size  # the last end before it
    first = boundary - min(num_new, 4) + 1 - num_new * num_inside
    ends = [first + n * num_new for n in range(num_inside + 2)]
    steps = [users.events(num_users, begin, begin + num_new) for begin in ends[:-1]]
    slots, history = users.slots(num_users), users.events(num_users, 0, first)
    inside_ms, move_ms = [], []
    for _ in range(_NUM_APPEND_ROUNDS + 1):
        states, remaining = way.encode(history, slots), iter(steps)

        def step() -> None:
            nonlocal states
            states = way.append(states, next(remaining), slots)  # noqa: B023  (called in this round only)

        inside_ms.append(1e3 * seconds(step, num_inside, 0))
        move_ms.append(1e3 * seconds(step, 1, 0))
    users.free(slots)
    share = min(1.0, num_new / windows.stride_events)
    means_ms = [(1 - share) * a + share * b for a, b in zip(inside_ms[1:], move_ms[1:], strict=True)]
    return spread(means_ms) | {
        "inside_ms": float(np.median(inside_ms[1:])),
        "move_ms": float(np.median(move_ms[1:])),
        "first_s": (inside_ms[0] * num_inside + move_ms[0]) / 1e3,
    }


def append_mixed(users: Users, way: Way, num_users: int, num_new: int) -> dict[str, float]:
    """The same of users who stand anywhere in their strides, as traffic's do: in most batches a few windows move, never all.

    They begin evenly over one stride, so that as many move in a round as in a part of a stride so long.
    """
    stride = users.model.windows.stride_events
    num_steps = min(_MOST_STEPS_MIXED, stride // num_new)
    rows, slots, all_ms = np.arange(num_users), users.slots(num_users), []
    for _ in range(_NUM_APPEND_ROUNDS + 1):
        phase_B = users.rng.permutation(rows) * stride // num_users + users.rng.integers(stride // num_users)
        first_B = users.num_events + phase_B
        states = way.encode(users.histories.slice_events(rows, rows * 0, first_B), slots)
        ends = [first_B + n * num_new for n in range(num_steps + 1)]
        steps = iter([users.histories.slice_events(rows, *span) for span in pairwise(ends)])

        def step() -> None:
            nonlocal states
            states = way.append(states, next(steps), slots)  # noqa: B023  (called in this round only)

        all_ms.append(1e3 * seconds(step, num_steps, 0))
    users.free(slots)
    return spread(all_ms[1:]) | {"first_s": all_ms[0] * num_steps / 1e3}


def hits(
    users: Users, way: Way, num_users: int, asked: dict[int, RequestBatch]
) -> Iterator[tuple[int, dict[str, float]]]:
    """The states are on the device."""
    slots, history = users.slots(num_users), users.events(num_users, 0, users.num_events)
    states = way.encode(history, slots)
    for candidates, batch in asked.items():
        step = partial(way.score, states, batch.request_ts_R, batch.candidates)
        yield candidates, rounds_ms(step, way.num_steps)
    users.free(slots)


def host_hits(
    users: Users, way: Way, num_users: int, asked: dict[int, RequestBatch]
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """`host hit`: each batch's states come from host memory, and go back as they came, which copies nothing; `host hit, grown`: as
    if they had grown in between, and are copied both ways."""
    history = users.events(num_users, 0, users.num_events)
    store = StateStore(users.model, 0, (num_users + 20) * 2 * users.state_bytes, users.pool.layout.precision)
    [way] = [other for other in ways(users.model, store.pool) if other.name == way.name]
    for user, state in enumerate(way.encode(history, store.slots([store.layout.largest_rows] * num_users))):
        store.put(user, _VERSION, Entry(state, 0, 0, Known("", 0), _NO_EVENTS, True))
    store.release()
    for arm in reversed(HOST_ARMS):  # first what the goals ask
        for candidates, batch in asked.items():
            step = partial(_host_hit, store, way, batch, has_grown=arm == HOST_ARMS[1])
            yield arm, candidates, rounds_ms(step, max(2, way.num_steps // 2))
    if store.counters.promote < len(HOST_ARMS) * len(asked) * NUM_ROUNDS * 2 * num_users:
        raise AssertionError("states did not come from host memory")


def _host_hit(store: StateStore, way: Way, batch: RequestBatch, has_grown: bool) -> None:
    taken = [held for user in range(batch.num_requests) if (held := store.take(user, _VERSION))]
    store.bring(taken)
    way.score([held.entry.state for held in taken], batch.request_ts_R, batch.candidates)
    if has_grown:
        for held in taken:
            store.update(held.user_key, replace(held.entry, state=replace(held.entry.state)))
    store.release()
