"""Rows of the sequence table, read beside the scorer's thread: buckets in parallel, and none asked that has just kept silent.

No Ray, no HTTP.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import inf
from threading import Lock

from longer.errors import StorageError
from longer.serving.history import HistorySource
from longer.serving.pending import Pending, read_together

_NUM_THREADS = 8
"""Reads at a time. Nearly all of a read's time is a wait for the store, and S3's clients keep ten connections."""
_PAUSE_S = 1.0
"""How long nothing is read where reading has failed; then one read tries."""
_SILENCE_S = 0.25
"""How long nothing has come back where the table may be stuck."""
_ALL = -1
"""Stands for all buckets."""


class Breaker:
    """Says what is worth a read. A bucket that could not be read is left alone for `_PAUSE_S`, and so are all of them once two in a
    row could not; then one read tries, and the others go on waiting for how it ends. For any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._closed_until_s = dict[int, float]()
        self._failed = set[int]()  # since a read succeeded

    def admits(self, bucket: int) -> bool:
        """Whether to read now; who does says how it went."""
        with self._lock:
            closed = [one for one in (bucket, _ALL) if one in self._closed_until_s]
            if any(self._closed_until_s[one] > time.monotonic() for one in closed):
                return False
            self._closed_until_s.update(dict.fromkeys(closed, inf))
            return True

    def succeeded(self, bucket: int) -> None:
        with self._lock:
            self._failed.clear()
            for one in (bucket, _ALL):
                self._closed_until_s.pop(one, None)

    def failed(self, bucket: int) -> None:
        with self._lock:
            self._failed.add(bucket)
            for one in (bucket, _ALL) if len(self._failed) > 1 or _ALL in self._closed_until_s else (bucket,):
                self._closed_until_s[one] = time.monotonic() + _PAUSE_S


class TableReads:
    """Reads what requests need, a task a bucket. While nothing comes back, at most `max_requests` wait; more are refused at once,
    so that those who need no read find the service free."""

    def __init__(self, history: HistorySource, max_requests: int) -> None:
        self._history, self._max_requests, self._breaker = history, max_requests, Breaker()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "table")
        self._lock, self._num_waiting, self._came_back_s = Lock(), 0, time.monotonic()

    def start(self, unread: Sequence[Pending]) -> "list[Future[None]]":
        """For each request, what ends when it has its row, or its error. Requests of one user have the same."""
        buckets = self._history.buckets([request.user_key for request in unread])
        reads = dict[int, Future[None]]()
        for bucket in set(buckets):
            requests = [request for request, its in zip(unread, buckets, strict=True) if its == bucket]
            with self._lock:
                if not self._num_waiting:
                    self._came_back_s = time.monotonic()
                silent_s = time.monotonic() - self._came_back_s
                is_full = silent_s > _SILENCE_S and self._num_waiting >= self._max_requests
                if not is_full:
                    self._num_waiting += len(requests)
            if is_full:
                reads[bucket] = self._refused(requests)
            else:
                reads[bucket] = self._threads.submit(self._read, bucket, requests)
                reads[bucket].add_done_callback(partial(self._came_back, len(requests)))
        return [reads[bucket] for bucket in buckets]

    def _came_back(self, num_requests: int, _: "Future[None]") -> None:
        with self._lock:
            self._num_waiting -= num_requests
            self._came_back_s = time.monotonic()

    def _refused(self, requests: Sequence[Pending]) -> "Future[None]":
        """At once, with nothing read."""
        self._refuse(requests)
        done = Future[None]()
        done.set_result(None)
        return done

    def _refuse(self, requests: Sequence[Pending]) -> None:
        for request in requests:
            request.error = StorageError(f"{self._history.path}: does not answer, and is left alone for a moment")

    def _read(self, bucket: int, requests: Sequence[Pending]) -> None:
        if not self._breaker.admits(bucket):
            self._refuse(requests)
            return
        try:
            error = read_together(self._history, requests)
        except BaseException:
            self._breaker.failed(bucket)
            raise
        if error:
            self._breaker.failed(bucket)
        else:
            self._breaker.succeeded(bucket)
