"""User states: encode once, append as events arrive, score any candidates; always equal to the training forward pass.

A state holds everything that later requests of its user need: keys and values of the full groups and of the tail, the inputs of
the query window (for when it moves), the events of the partial newest group, and the index that counts candidates. Its tensors
lie in a slot of a `StatePool`, where all three functions read and write them; only new rows are written. The functions take
batches of users of different lengths.

B users, G groups, P computed group rows of all users (flat), N new full groups of all users (flat), T tail tokens, D width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longer.arrays import Candidates, Histories, Int64
from longer.model.context import Tail
from longer.model.fuse import computed_in
from longer.model.grow import grow
from longer.model.growth import Growth
from longer.model.inputs import RequestTensors, feature_tensors, on
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.pool_context import PoolContext, StagedContext
from longer.model.pool_index import PoolIndex
from longer.model.state_layout import Places, StateLayout
from longer.slots import Slot

Grow = Callable[[Growth], None]


@dataclass(frozen=True)
class UserState:
    """What is kept of one user who has `num_events` events over all time, the windows' newest `num_events - first_index` here.

    `partial` are the events of the partial newest group; everything else lies in `slot`.
    """

    user_key: int
    first_index: int
    num_events: int
    last_event_ts: int
    query_first: int
    partial: Histories
    slot: Slot


def rows_for(layout: StateLayout, end_index_B: Int64) -> Int64:
    """[B]: rows of the slots that states of users with so many events need."""
    windows = layout.windows
    return layout.num_rows(end_index_B // windows.merge_size - windows.history_start(end_index_B))


@torch.inference_mode()
def encode(
    model: Longer, pool: StatePool, histories: Histories, slots: Sequence[Slot], carry_out: Grow | None = None
) -> list[UserState]:
    """States of B users from scratch, each written into its slot (`rows_for`).

    Each history starts at or before its user's history window; it may be empty. `carry_out` stands for `grow`, of this model.
    """
    end_B, windows = histories.end_index_B, model.windows
    start_B = windows.history_start(end_B) * windows.merge_size
    is_whole = np.array_equal(start_B, histories.first_index_B)
    window = histories if is_whole else histories.slice_events(np.arange(len(histories)), start_B, end_B)
    places = _places(pool, slots)
    growth = Growth(pool, window, places, start_B, windows.query_start(end_B), start_B, places)
    return _advanced(model, growth, slots, carry_out)


@torch.inference_mode()
def append(
    model: Longer,
    pool: StatePool,
    states: Sequence[UserState],
    new: Histories,
    slots: Sequence[Slot],
    carry_out: Grow | None = None,
) -> list[UserState]:
    """The states with each user's new events added: `new.first_index_B[b] == states[b].num_events`; rows may be empty.

    With its own slot a state grows in place and the old one is no more; with another (`rows_for`) it stays as it is. Costs what
    the new events cost, but for once in a stride, when the query window's rows are recomputed from kept inputs; and but for the
    interaction index: its pairs, one word for each field of each event of the window, are merged with the new ones.
    """
    growth = Growth(
        pool=pool,
        events=Histories.concatenate([state.partial for state in states]).followed_by(new),
        old_places=_places(pool, [state.slot for state in states]),
        old_first_index_B=np.array([state.first_index for state in states], np.int64),
        old_query_first_B=np.array([state.query_first for state in states], np.int64),
        old_num_events_B=np.array([state.num_events for state in states], np.int64),
        places=_places(pool, slots),
    )
    return _advanced(model, growth, slots, carry_out)


@torch.inference_mode()
def score(
    model: Longer, pool: StatePool, states: Sequence[UserState], request_ts_R: Int64, candidates: Candidates
) -> np.ndarray:
    """[C, tasks] float outputs as the model's forward pass gives: request r asks `states[r]` about its own candidates."""
    device, num_events_R = pool.device, np.array([state.num_events for state in states], np.int64)
    history_end, request_ts, candidate_offsets = on(device, num_events_R, request_ts_R, candidates.offsets_R1)
    requests = RequestTensors(
        row_R=torch.arange(len(states), device=device),
        history_end_R=history_end,
        request_ts_R=request_ts,
        candidate_offsets_R1=candidate_offsets,
        candidates=feature_tensors(candidates, device),
        labels={},
    )
    with computing(model, pool):
        return gather(model, pool, states).outputs(model, requests).cpu().numpy()


@dataclass(frozen=True)
class Gathered:
    """The states of B users as one batch that candidates read where they lie."""

    context: PoolContext | StagedContext
    tail: Tail
    index: PoolIndex | None
    num_events_B: Tensor
    last_event_ts_B: Tensor

    def outputs(self, model: Longer, requests: RequestTensors) -> Tensor:
        """[C, tasks] of requests that ask one user each, in order; the device is not waited for."""
        return model.candidates(self.context, self.tail, self.index, requests, self.last_event_ts_B)


def gather(model: Longer, pool: StatePool, states: Sequence[UserState]) -> Gathered:
    """Where the states lie, and a copy of their tails. Valid until a state is appended to or the pool moves one."""
    context = context_of(pool, states)
    (last_ts_B,) = on(pool.device, np.array([state.last_event_ts for state in states], np.int64))
    return gathered(model, context, context.numbers, last_ts_B)


def context_of(pool: StatePool, states: Sequence[UserState]) -> PoolContext:
    """Where the states lie."""
    held = [(s.slot.start, s.slot.size, s.first_index, s.query_first, s.num_events) for s in states]
    starts, sizes, first_index, query_first, num_events = np.array(held, np.int64).reshape(-1, 5).T
    merge_size = pool.layout.windows.merge_size
    return PoolContext(pool, pool.places(starts, sizes), first_index // merge_size, query_first, num_events)


def gathered(
    model: Longer, context: PoolContext | StagedContext, numbers: dict[str, Tensor], last_ts_B: Tensor
) -> Gathered:
    """The states of a context as candidates read them; `numbers` are its arrays on the device."""
    index, pool = None, context.pool
    if model.settings.interactions:
        index = PoolIndex(pool, *(numbers[name] for name in ("event_ts", "event_words", "first", "num_events")))
    tail = context.tail(computed_in(model.layers[0].query.weight))
    return Gathered(context, tail, index, numbers["num_events"], last_ts_B)


def computing_dtype(model: Longer, pool: StatePool) -> torch.dtype:
    """What keys and queries are computed in: bf16 on CUDA where states are kept in no more than that."""
    if pool.device.type == "cuda" and pool.layout.precision in ("bf16", "int8", "fp8"):
        return torch.bfloat16
    return model.norm_head.weight.dtype


def computing(model: Longer, pool: StatePool) -> AbstractContextManager:
    """Computes in `computing_dtype`."""
    is_mixed = computing_dtype(model, pool) == torch.bfloat16
    return torch.autocast(pool.device.type, torch.bfloat16) if is_mixed else nullcontext()


def _places(pool: StatePool, slots: Sequence[Slot]) -> Places:
    return pool.places(
        np.array([slot.start for slot in slots], np.int64), np.array([slot.size for slot in slots], np.int64)
    )


def _check_room(growth: Growth, slots: Sequence[Slot]) -> None:
    """What does not fit would be written over another user's state."""
    needed_B = rows_for(growth.pool.layout, growth.events.end_index_B)
    if short := [(slot.size, int(rows)) for slot, rows in zip(slots, needed_B, strict=True) if slot.size < rows]:
        raise ValueError(
            f"a state of {short[0][1]} rows does not fit into its slot of {short[0][0]}: allocate `rows_for` rows"
        )


def _advanced(model: Longer, growth: Growth, slots: Sequence[Slot], carry_out: Grow | None) -> list[UserState]:
    _check_room(growth, slots)
    if carry_out:
        carry_out(growth)
    else:
        with computing(model, growth.pool):
            grow(model, growth)
    events, merge_size = growth.events, model.windows.merge_size
    end_B = events.end_index_B
    rows = np.arange(len(events))
    partial = events.slice_events(rows, np.maximum(end_B // merge_size * merge_size, events.first_index_B), end_B)
    last_ts_B, has_events_B = events.prev_event_ts_B.copy(), np.diff(events.offsets_B1) > 0
    last_ts_B[has_events_B] = events.event_ts_E[events.offsets_B1[1:][has_events_B] - 1]
    first_B, query_first_B = growth.first_B * merge_size, growth.query_first_B
    return [
        UserState(
            user_key=int(events.user_key_B[b]),
            first_index=int(first_B[b]),
            num_events=int(end_B[b]),
            last_event_ts=int(last_ts_B[b]),
            query_first=int(query_first_B[b]),
            partial=partial_1,
            slot=slot,
        )
        for b, (partial_1, slot) in enumerate(zip(partial.split(), slots, strict=True))
    ]
