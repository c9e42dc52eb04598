"""From histories and requests to what the model reads: requests of one user packed so that they share one history.

A request's history is never copied into it: requests of a user whose window starts agree (`longer.windows`) become one pack,
and a pack's history is stored once, from the common window start to the newest request's end.

B histories, R requests, C candidates in all of them, P packs, U users without an event, N rows or packs chosen.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from longer.arrays import NO_EVENT_TS, Candidates, Float32, Histories, Int64, RequestBatch, changes, offsets_of, ranges
from longer.windows import WindowRule


@dataclass(frozen=True)
class Requests:
    """R requests with C candidates in all, as a table holds them: keys for the model, raw ids for outputs."""

    request_id_R: Int64
    user_id_R: pa.Array
    user_key_R: Int64
    request_ts_R: Int64
    history_end_R: Int64
    candidates: Candidates
    item_id_C: pa.Array
    labels: dict[str, Float32]

    def __len__(self) -> int:
        return len(self.request_id_R)

    def take(self, rows_N: Int64) -> "Requests":
        """Requests `rows_N`, in that order."""
        offsets, picked_C = ranges(self.candidates.offsets_R1[rows_N], self.candidates.offsets_R1[rows_N + 1])
        return Requests(
            request_id_R=self.request_id_R[rows_N],
            user_id_R=self.user_id_R.take(pa.array(rows_N)),
            user_key_R=self.user_key_R[rows_N],
            request_ts_R=self.request_ts_R[rows_N],
            history_end_R=self.history_end_R[rows_N],
            candidates=Candidates(offsets, {name: x[picked_C] for name, x in self.candidates.features.items()}),
            item_id_C=self.item_id_C.take(pa.array(picked_C)),
            labels={name: x[picked_C] for name, x in self.labels.items()},
        )

    def without_raw_ids(self) -> "Requests":
        """The same with nulls for them, which take no memory: training reads keys only."""
        num_candidates = int(self.candidates.offsets_R1[-1])
        return replace(self, user_id_R=pa.nulls(len(self)), item_id_C=pa.nulls(num_candidates))


@dataclass(frozen=True)
class Packs:
    """P packs: pack p is the requests `order_R[offsets_P1[p]:offsets_P1[p + 1]]`, oldest first."""

    order_R: Int64
    offsets_P1: Int64

    def __len__(self) -> int:
        return len(self.offsets_P1) - 1

    def take(self, packs_N: Int64) -> "Packs":
        """Packs `packs_N`, in that order."""
        offsets, picked_R = ranges(self.offsets_P1[packs_N], self.offsets_P1[packs_N + 1])
        return Packs(self.order_R[picked_R], offsets)

    def sums(self, values_R: Int64) -> Int64:
        """[P]: sums over each pack's requests."""
        return np.diff(offsets_of(values_R[self.order_R])[self.offsets_P1])


def plan_packs(row_R: Int64, history_end_R: Int64, windows: WindowRule, max_requests: int) -> Packs:
    """Packs that hold every request once: one user's, equal window starts, in time order, at most `max_requests` each."""
    order_R = np.lexsort((history_end_R, row_R))  # stable: requests of one time keep their order
    row, end = row_R[order_R], history_end_R[order_R]
    new_run = changes(row, windows.history_start(end), windows.query_start(end))
    place = np.arange(len(row))
    place -= np.maximum.accumulate(np.where(new_run, place, 0))  # in its run
    first = np.flatnonzero(place % max_requests == 0)
    return Packs(order_R, np.append(first, len(row)))


def with_all_users(histories: Histories, user_key_R: Int64) -> Histories:
    """The histories, and behind them an empty one of every user who asks and has done nothing."""
    new_U = np.setdiff1d(user_key_R, histories.user_key_B)
    if not len(new_U):
        return histories
    none_U, nothing = np.zeros(len(new_U), np.int64), {name: x[:0] for name, x in histories.features.items()}
    empty = Histories(new_U, np.append(none_U, 0), none_U, np.full(len(new_U), NO_EVENT_TS), none_U[:0], nothing)
    return Histories.concatenate([histories, empty])


def rows_of_requests(histories: Histories, requests: Requests) -> Int64:
    """The history row of each request, by user key; every request's user must be among the histories."""
    order_B = np.argsort(histories.user_key_B, kind="stable")
    return order_B[np.searchsorted(histories.user_key_B, requests.user_key_R, sorter=order_B)]


def assemble(histories: Histories, row_R: Int64, requests: Requests, packs: Packs, windows: WindowRule) -> RequestBatch:
    """One batch of the packs' requests, in their order; history i is pack i's, from its window start to its newest end.

    `row_R` is the row in `histories` of each of `requests`. The histories must reach back to every window start.
    """
    oldest_P, newest_P = packs.order_R[packs.offsets_P1[:-1]], packs.order_R[packs.offsets_P1[1:] - 1]
    starts_P = windows.history_start(requests.history_end_R[oldest_P]) * windows.merge_size
    chosen = requests.take(packs.order_R)
    return RequestBatch(
        histories=histories.slice_events(row_R[oldest_P], starts_P, requests.history_end_R[newest_P]),
        row_R=np.repeat(np.arange(len(packs)), np.diff(packs.offsets_P1)),
        history_end_R=chosen.history_end_R,
        request_ts_R=chosen.request_ts_R,
        candidates=chosen.candidates,
        request_id_R=chosen.request_id_R,
        labels=chosen.labels,
    )
