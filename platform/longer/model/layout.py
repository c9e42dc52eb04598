"""Where everything of a batch lies in the flat pass, worked out on the host from the batch alone: the device is never asked.

B histories, E events of all histories, N full groups of all histories, P of them in query windows, R requests, T tail tokens of a
request, C candidates.
"""

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from longer.arrays import Int64, RequestBatch, offsets_of
from longer.windows import WindowRule

T = TypeVar("T", Int64, Tensor)


class Sizes(NamedTuple):
    """How much of everything a batch has, or may have: batches filled up to the same sizes have the same shapes."""

    events: int
    groups: int
    queries: int
    rows: int
    requests: int
    candidates: int

    @staticmethod
    def of(batch: RequestBatch, windows: WindowRule) -> "Sizes":
        histories = batch.histories
        of_histories = Sizes.of_histories(histories.first_index_B, histories.end_index_B, windows)
        num_events, num_groups, num_queries = (int(each_B.sum()) for each_B in of_histories)
        num_candidates = int(batch.candidates.offsets_R1[-1])
        return Sizes(num_events, num_groups, num_queries, len(histories), batch.num_requests, num_candidates)

    @staticmethod
    def of_histories(first_index_B: Int64, end_B: Int64, windows: WindowRule) -> tuple[Int64, Int64, Int64]:
        """Events, groups and queries of each history with these absolute indices."""
        num_groups_B = end_B // windows.merge_size - first_index_B // windows.merge_size
        num_queries_B = np.maximum(end_B // windows.merge_size - windows.query_start(end_B), 0)
        return end_B - first_index_B, num_groups_B, num_queries_B


class Layout(NamedTuple, Generic[T]):
    """Where everything of a batch lies: arrays on the host, tensors on the device. Tails and candidates follow groups everywhere.

    `start` and `size` of the N full groups and then the R partial ones among the events; `position` of the N groups, tails and
    candidates; `query` numbers the query windows' groups among the N, `window` the P groups, tails and candidates among all those
    positions. `visible` counts the groups of its history that each of the P + R*T + C tokens sees in the first layer,
    `visible_above` in the layers above.
    """

    start: T
    size: T
    position: T
    query: T
    window: T
    visible: T
    visible_above: T
    group_offsets: T
    query_offsets: T
    num_groups: T
    num_queries: T
    segment_offsets: T
    event_begin: T
    candidate_offsets: T
    request_of_candidate: T
    row_of_candidate: T
    count_begin: T
    count_end: T
    user_key: T
    request_ts: T
    last_ts: T
    event_ts: T
    previous_ts: T


@dataclass(frozen=True)
class FlatBatch:
    """A batch laid out for the flat pass, on the host (`arrays`); the ints are its shapes."""

    arrays: dict[str, npt.NDArray]
    num_groups: int
    num_queries: int
    num_requests: int
    max_keys: tuple[int, int]


def flatten(batch: RequestBatch, windows: WindowRule, num_tail: int, room: Sizes | None = None) -> FlatBatch:
    """The layout of a batch that has at least one event, with its features and labels, on the host.

    With `room`, everything is filled up to these sizes with what nobody reads, plus a row and a request that it belongs to; the
    outputs of the batch's own candidates come first and are the same.
    """
    layout = _layout(batch, windows, num_tail, room or Sizes.of(batch, windows), is_filled=room is not None)
    histories = batch.histories
    num_events, num_candidates = len(layout.event_ts), len(layout.request_of_candidate)
    arrays = {f"layout.{name}": array for name, array in layout._asdict().items()}
    arrays |= {f"event.{name}": _fill(x, num_events) for name, x in histories.features.items()}
    arrays |= {f"candidate.{name}": _fill(x, num_candidates) for name, x in batch.candidates.features.items()}
    arrays |= {f"label.{name}": _fill(x, num_candidates) for name, x in batch.labels.items()}
    num_requests = len(layout.request_ts)
    bounds = windows.history_groups + windows.stride_groups, windows.query_groups + windows.stride_groups
    max_keys = bounds if room else (int(layout.num_groups.max()), int(layout.num_queries.max()))
    return FlatBatch(arrays, len(layout.start) - num_requests, len(layout.query), num_requests, max_keys)


def _layout(batch: RequestBatch, windows: WindowRule, num_tail: int, room: Sizes, is_filled: bool) -> Layout[Int64]:
    histories, merge_size = batch.histories, windows.merge_size
    num_rows, num_requests = room.rows + is_filled, room.requests + is_filled
    offsets_B, first_index_B = _fill(histories.offsets_B1[:-1], num_rows), _fill(histories.first_index_B, num_rows)
    end_index_B = _fill(histories.end_index_B, num_rows)
    first_B, end_B = first_index_B // merge_size, end_index_B // merge_size
    query_first_B = windows.query_start(end_index_B)
    num_groups_B, num_queries_B = end_B - first_B, np.maximum(end_B - query_first_B, 0)
    row_N, slot_N = _ranges(num_groups_B)
    row_P, slot_P = _ranges(num_queries_B)
    group_P = query_first_B[row_P] + slot_P
    group_offsets_B1 = offsets_of(num_groups_B)
    num_groups_B[-1] += room.groups - len(
        row_N
    )  # of the row that nobody asks about; nothing is left where nothing is filled
    num_queries_B[-1] += room.queries - len(row_P)

    row_R = _fill(batch.row_R, num_requests, num_rows - 1)
    history_end_R = _fill(batch.history_end_R, num_requests)
    full_R, asked_R = history_end_R // merge_size, windows.num_groups(history_end_R)
    partial_start_R = full_R * merge_size
    size_R = history_end_R - partial_start_R
    candidate_offsets_R1 = _fill(batch.candidates.offsets_R1, num_requests + 1, int(batch.candidates.offsets_R1[-1]))
    candidate_offsets_R1[-1] = room.candidates
    request_C = np.repeat(np.arange(num_requests), np.diff(candidate_offsets_R1))
    private = np.concatenate([np.repeat(np.arange(num_requests), num_tail), request_C])
    position_RT = np.where(np.arange(num_tail) == 0, full_R[:, None], asked_R[:, None]).ravel()
    position_N = _fill(first_B[row_N] + slot_N, room.groups)
    query_P = _fill((group_offsets_B1[:-1] + query_first_B - first_B)[row_P] + slot_P, room.queries)
    per_row_B1 = np.searchsorted(row_R, np.arange(num_rows + 1))
    count_begin_R = windows.history_start(history_end_R) * merge_size - first_index_B[row_R]
    visible_P = _fill(group_P - first_B[row_P] + 1, room.queries)
    start_R = (offsets_B - first_index_B)[row_R] + partial_start_R
    return Layout(
        start=np.concatenate([_fill(offsets_B[row_N] + slot_N * merge_size, room.groups), start_R]),
        size=np.concatenate([_fill(np.full(len(row_N), merge_size), room.groups), size_R]),
        position=np.concatenate([position_N, position_RT, asked_R[request_C]]),
        query=query_P,
        window=np.concatenate([query_P, room.groups + np.arange(len(private))]),
        visible=np.concatenate([visible_P, (full_R - first_B[row_R])[private]]),
        visible_above=np.concatenate([_fill(slot_P + 1, room.queries), (full_R - query_first_B[row_R])[private]]),
        group_offsets=offsets_of(num_groups_B),
        query_offsets=offsets_of(num_queries_B),
        num_groups=num_groups_B,
        num_queries=num_queries_B,
        segment_offsets=offsets_of(
            np.concatenate([num_queries_B, np.diff(per_row_B1) * num_tail, np.diff(candidate_offsets_R1[per_row_B1])])
        ),
        event_begin=offsets_B,
        candidate_offsets=candidate_offsets_R1,
        request_of_candidate=request_C,
        row_of_candidate=row_R[request_C],
        count_begin=count_begin_R[request_C],
        count_end=(history_end_R - first_index_B[row_R])[request_C],
        user_key=_fill(histories.user_key_B, num_rows)[row_R],
        request_ts=_fill(batch.request_ts_R, num_requests),
        last_ts=_fill(_last_ts(batch), num_requests),
        event_ts=_fill(histories.event_ts_E, room.events),
        previous_ts=_fill(_previous_ts(batch), room.events),
    )


def _last_ts(batch: RequestBatch) -> Int64:
    """[R]: time of the event just before each request's end."""
    histories, row_R = batch.histories, batch.row_R
    offset_R = batch.history_end_R - histories.first_index_B[row_R]
    event_R = np.where(offset_R > 0, histories.offsets_B1[row_R] + offset_R - 1, 0)
    return np.where(offset_R > 0, histories.event_ts_E[event_R], histories.prev_event_ts_B[row_R])


def _previous_ts(batch: RequestBatch) -> Int64:
    """[E]: time of the event before each event, across the start of the row."""
    histories = batch.histories
    previous_E = np.roll(histories.event_ts_E, 1)
    has_events_B = np.diff(histories.offsets_B1) > 0
    previous_E[histories.offsets_B1[:-1][has_events_B]] = histories.prev_event_ts_B[has_events_B]
    return previous_E


def _fill(array: npt.NDArray, size: int, value: int = 0) -> npt.NDArray:
    """The array, and `value` after it up to `size`."""
    return np.concatenate([array, np.full(size - len(array), value, array.dtype)])


def _ranges(sizes_B: Int64) -> tuple[Int64, Int64]:
    """Row, and number inside it, of everything in rows of these sizes."""
    row_N = np.repeat(np.arange(len(sizes_B)), sizes_B)
    return row_N, np.arange(len(row_N)) - offsets_of(sizes_B)[row_N]
