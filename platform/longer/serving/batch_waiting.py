"""Buckets of an actor that wait to be compared, so that the serving path answers for several at once.

On a GPU it takes as many launches, each of which waits for Python, for four users as for the 32 that it answers as one batch.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from longer.data.records import Record
from longer.serving.batch_check import OnlineCheck

_MOST_WAIT_S = 20.0
"""Since the first of them was begun: work of so many seconds, and of a bucket's, is lost if the actor dies."""


@dataclass(frozen=True)
class Written:
    """A bucket whose file is there; its record, but for what is compared."""

    record: Record
    check: OnlineCheck
    begun_s: float
    ended_s: float = field(default_factory=time.perf_counter)


class Waiting:
    """Of threads that each write a bucket at a time: a bucket is due once, in one of them, and none waits when no one is at work.

    `most_users` are compared at once, and `most_candidates`.
    """

    def __init__(self, most_users: int, most_candidates: int) -> None:
        self._most = most_users, most_candidates
        self._lock, self._num_at_work, self._waiting = threading.Lock(), 0, list[Written]()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Around a bucket's file, after which the thread asks what is due."""
        with self._lock:
            self._num_at_work += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_at_work -= 1

    def due(self, written: Written) -> list[Written]:
        """All that wait, this one too, for this thread to compare; or none: another thread is at work, and will ask."""
        with self._lock:
            self._waiting.append(written)
            if self._num_at_work and self._have_time_and_room(written):
                return []
            due, self._waiting = self._waiting, []
            return due

    def _have_time_and_room(self, newest: Written) -> bool:
        """For another bucket like the newest; one of which nothing is compared has nothing to wait for."""
        sizes = [(len(one.check.numbers), one.check.num_candidates) for one in [*self._waiting, newest]]
        has_room = all(sum(size) <= most for size, most in zip(zip(*sizes, strict=True), self._most, strict=True))
        is_young = time.perf_counter() - self._waiting[0].begun_s < _MOST_WAIT_S
        return has_room and is_young and len(newest.check.numbers) > 0
