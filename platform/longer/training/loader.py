"""A split as flat arrays, in memory or mapped from a file, and its batches assembled ahead of the consumer.

B histories, R requests, C candidates in all of them, P packs, N requests or candidates chosen, T tasks.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from longer.arrays import MS_PER_DAY, Candidates, Histories, Int64, RequestBatch, offsets_of
from longer.data.batches import (
    Packs,
    Requests,
    assemble,
    plan_packs,
    rows_of_requests,
    with_all_users,
)
from longer.data.requests import SPLITS
from longer.data.tables import RequestTable, SequenceTable
from longer.errors import UserError
from longer.model.layout import Sizes
from longer.training.cursor import EpochPlan
from longer.windows import WindowRule

T = TypeVar("T")

_SCORED_PACK_REQUESTS = 64
"""Requests of one user that share an encode where nothing is learned, so that alike requests do no harm."""

COST_PER_BATCH = 1 << 15
"""Events and candidates scored together: enough to fill the cores, little enough for their caches."""


@dataclass(frozen=True)
class SplitData:
    """R requests of a split and the histories that they read; `row_R` is each request's row in the histories."""

    histories: Histories
    requests: Requests
    row_R: Int64
    windows: WindowRule

    def take(self, requests_N: Int64 | None) -> "SplitData":
        """The same histories with requests `requests_N` only; None: all."""
        if requests_N is None:
            return self
        return SplitData(self.histories, self.requests.take(requests_N), self.row_R[requests_N], self.windows)

    def newest(self, max_requests: int | None) -> Int64 | None:
        """The newest `max_requests` requests, ascending; None: all."""
        if max_requests is None or max_requests >= len(self.requests):
            return None
        order = np.lexsort((self.requests.request_id_R, self.requests.request_ts_R))
        return np.sort(order[-max_requests:])

    def spread(self, max_requests: int) -> Int64 | None:
        """At most `max_requests` requests, evenly over users and each user's time, the same ones every time; None: all."""
        if max_requests >= len(self.requests):
            return None
        order = np.lexsort((self.requests.request_ts_R, self.row_R))
        return order[np.arange(max_requests) * len(order) // max_requests]

    @property
    def row_C(self) -> Int64:
        """The history row of each candidate."""
        return np.repeat(self.row_R, np.diff(self.requests.candidates.offsets_R1))

    def packs(self, max_pack_requests: int, among_N: Int64 | None = None) -> Packs:
        """Packs of requests `among_N`, or of all. A choice of packs is one of requests: these are not copied for it."""
        if among_N is None:
            return plan_packs(self.row_R, self.requests.history_end_R, self.windows, max_pack_requests)
        row_N, end_N = self.row_R[among_N], self.requests.history_end_R[among_N]
        packs = plan_packs(row_N, end_N, self.windows, max_pack_requests)
        return Packs(among_N[packs.order_R], packs.offsets_P1)

    def packs_by_day(self, max_pack_requests: int) -> tuple[Packs, Int64]:
        """Packs of which none holds requests of two days, and the day of each, in days since 1970 UTC."""
        day_R = self.requests.request_ts_R // MS_PER_DAY
        row_of_day_R = self.row_R * (day_R.max(initial=0) + 1) + day_R
        packs = plan_packs(row_of_day_R, self.requests.history_end_R, self.windows, max_pack_requests)
        return packs, day_R[packs.order_R[packs.offsets_P1[:-1]]]

    def num_candidates(self, packs: Packs) -> Int64:
        """Candidates of each pack."""
        return packs.sums(np.diff(self.requests.candidates.offsets_R1))

    def cost(self, packs: Packs) -> Int64:
        """Events and candidates that each pack makes the model compute."""
        start_P, end_P = self._spans(packs)
        return end_P - start_P + self.num_candidates(packs)

    def sizes(self, packs: Packs) -> list[Int64]:
        """The `Sizes` of each pack, each [P]; those of a batch are the sums over its packs."""
        of_histories = Sizes.of_histories(*self._spans(packs), self.windows)
        return [*of_histories, np.ones(len(packs), np.int64), np.diff(packs.offsets_P1), self.num_candidates(packs)]

    def num_cut(self) -> int:
        """Requests whose history window starts before the events that are there."""
        start_R = self.windows.history_start(self.requests.history_end_R) * self.windows.merge_size
        return int((start_R < self.histories.first_index_B[self.row_R]).sum())

    def _spans(self, packs: Packs) -> tuple[Int64, Int64]:
        """Absolute index of the first event that each pack's history window holds, and the one after its last."""
        end_P = self.requests.history_end_R[packs.order_R[packs.offsets_P1[1:] - 1]]
        return self.windows.history_start(end_P) * self.windows.merge_size, end_P

    def batch(self, packs: Packs) -> RequestBatch:
        return assemble(self.histories, self.row_R, self.requests, packs, self.windows)


def largest_batch(sizes_of_packs: list[Int64], plans: Iterable[EpochPlan]) -> Sizes:
    """The most of everything in any batch of these epochs."""
    return Sizes(*np.max([[plan.sums(size_P).max() for size_P in sizes_of_packs] for plan in plans], axis=0).tolist())


def score_packs(
    data: SplitData, packs: Packs, score: Callable[[RequestBatch], npt.NDArray[np.float32]]
) -> Iterator[tuple[Int64, npt.NDArray[np.float32]]]:
    """Rows among all candidates of `data`, and their scores, batch by batch. Packs of similar cost go together: less padding."""
    cost_P = data.cost(packs)
    by_cost = np.argsort(cost_P, kind="stable")
    batch_P = np.cumsum(cost_P[by_cost]) // COST_PER_BATCH
    offsets_R1 = data.requests.candidates.offsets_R1
    for members in np.split(by_cost, np.flatnonzero(np.diff(batch_P)) + 1):
        if len(members):
            chosen = packs.take(members)
            rows = [np.arange(offsets_R1[request], offsets_R1[request + 1]) for request in chosen.order_R]
            yield np.concatenate(rows), score(data.batch(chosen))


def score_split(
    data: SplitData, score: Callable[[RequestBatch], npt.NDArray[np.float32]], num_tasks: int
) -> npt.NDArray[np.float32]:
    """[C, T] outputs of all candidates of `data`, in their order."""
    output_CT = np.empty((len(data.requests.item_id_C), num_tasks), np.float32)
    for rows_N, outputs_NT in score_packs(data, data.packs(_SCORED_PACK_REQUESTS), score):
        output_CT[rows_N] = outputs_NT
    return output_CT


@dataclass(frozen=True)
class Part:
    """Histories of some buckets, the requests of their users in each of some splits, and each request's row in the histories."""

    histories: Histories
    requests: list[Requests]
    rows: list[Int64]

    def splits(self, windows: WindowRule) -> list[SplitData]:
        of_splits = zip(self.requests, self.rows, strict=True)
        return [SplitData(self.histories, requests, row_R, windows) for requests, row_R in of_splits]

    def none(self) -> "Part":
        """The same of no user."""
        none = np.empty(0, np.int64)
        requests = [of_split.take(none) for of_split in self.requests]
        return Part(self.histories.slice_events(none, none, none), requests, [none] * len(requests))


def read_part(sequences: SequenceTable, requests: RequestTable, splits: Sequence[str], buckets: Iterable[int]) -> Part:
    """The splits' requests in some buckets; users who have done nothing are there too, behind the others of their bucket."""
    return _in_buckets(sequences, buckets, lambda bucket: [requests.read(split, bucket) for split in splits])


def read_part_since(sequences: SequenceTable, requests: RequestTable, since_ms: int, buckets: Iterable[int]) -> Part:
    """The requests of all splits from a time on, as if of one split."""

    def since(bucket: int) -> list[Requests]:
        every = concat_requests([requests.read(split, bucket) for split in SPLITS])
        return [every.take(np.flatnonzero(every.request_ts_R >= since_ms))]

    return _in_buckets(sequences, buckets, since)


def _in_buckets(sequences: SequenceTable, buckets: Iterable[int], read: Callable[[int], list[Requests]]) -> Part:
    found, asked = [], []
    for bucket in buckets:
        asked.append(read(bucket))
        user_key_R = np.concatenate([requests.user_key_R for requests in asked[-1]])
        found.append(with_all_users(sequences.read_bucket(bucket)[1], user_key_R))
    histories, requests = (
        Histories.concatenate(found),
        [concat_requests(list(split)) for split in zip(*asked, strict=True)],
    )
    return Part(histories, requests, [rows_of_requests(histories, of_split) for of_split in requests])


def read_split(
    sequences: SequenceTable,
    requests: RequestTable,
    split: str,
    windows: WindowRule,
    buckets: Iterable[int] | None = None,
) -> SplitData:
    """A split, or some buckets of it, in memory."""
    wanted = range(requests.num_buckets) if buckets is None else buckets
    (data,) = read_part(sequences, requests, [split], wanted).splits(windows)
    check_windows(data.num_cut(), windows, sequences.version.path, split)
    return data


def check_windows(num_cut: int, windows: WindowRule, path: str, name: str) -> None:
    """A UserError if the sequence table at `path` has cut the history windows of some requests of a split."""
    if num_cut:
        raise UserError(
            f"model.history_events={windows.history_groups * windows.merge_size}: the history windows of {num_cut} {name} "
            f"requests start before the events that {path} keeps: build sequences and requests again with these settings, or lower "
            "history_events"
        )


def concat_requests(parts: list[Requests]) -> Requests:
    """The requests of all parts, in order; the parts share their features and tasks."""
    sizes_R = np.concatenate([np.diff(part.candidates.offsets_R1) for part in parts])
    first = parts[0]
    return Requests(
        request_id_R=np.concatenate([part.request_id_R for part in parts]),
        user_id_R=pa.concat_arrays([part.user_id_R for part in parts]),
        user_key_R=np.concatenate([part.user_key_R for part in parts]),
        request_ts_R=np.concatenate([part.request_ts_R for part in parts]),
        history_end_R=np.concatenate([part.history_end_R for part in parts]),
        candidates=Candidates(
            offsets_of(sizes_R),
            {
                name: np.concatenate([part.candidates.features[name] for part in parts])
                for name in first.candidates.features
            },
        ),
        item_id_C=pa.concat_arrays([part.item_id_C for part in parts]),
        labels={task: np.concatenate([part.labels[task] for part in parts]) for task in first.labels},
    )


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """The items in order, up to `depth` made ahead by a thread; what the thread raises is raised here.

    Closing the iterator ends the thread.
    """
    ahead: queue.Queue[tuple[str, object]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(kind: str, value: object) -> bool:
        while not closed.is_set():
            try:
                ahead.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ahead.get()
            if kind == "error":
                raise value  # type: ignore[misc]
            if kind == "end":
                return
            yield value  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
