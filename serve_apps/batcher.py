"""Requests that wait for the scorer, taken together when it is free. No torch, no Ray.

No timer: a request that finds the scorer idle is scored at once, and those that come meanwhile wait for that batch to end and
make the next one. So batches are as large as the load makes them, and a request waits for one batch besides those ahead of it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

from longer.serving.stages import collected_ms

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Times:
    """Milliseconds that an item waited for its batch, and of the whole batch by stage; `score` is all without another name."""

    queue_ms: float
    batch_ms: Mapping[str, float]


@dataclass(frozen=True)
class _Waiting(Generic[Item, Outcome]):
    item: Item
    answer: "asyncio.Future[tuple[Outcome, Times]]"
    since_s: float


class MicroBatcher(Generic[Item, Outcome]):
    """Runs `work` on batches of at most `max_items`, in the one thread of `worker`, between whatever else is asked of that.

    `account` is told of every batch when its callers have been answered. A batch that fails is tried again item by item: `work` may
    be repeated.
    """

    def __init__(
        self,
        worker: Executor,
        work: Callable[[list[Item]], Sequence[Outcome]],
        max_items: int,
        account: Callable[[Sequence[Times]], None],
    ) -> None:
        self._worker, self._work, self._max_items, self._account = worker, work, max_items, account
        self._waiting: deque[_Waiting[Item, Outcome]] = deque()
        self._lock, self._is_running = Lock(), False

    def __len__(self) -> int:
        """Items that wait for their batch."""
        return len(self._waiting)

    async def ask(self, *items: Item) -> list[tuple[Outcome, Times]]:
        """Each item's outcome. Who is cancelled before the batch begins is left out of it."""
        loop, now_s = asyncio.get_running_loop(), time.perf_counter()
        asked: list[_Waiting[Item, Outcome]] = [_Waiting(item, loop.create_future(), now_s) for item in items]
        with self._lock:
            self._waiting += asked
            starts, self._is_running = not self._is_running, True
        if starts:
            self._worker.submit(self._run, loop)
        if len(asked) == 1:  # the usual call, which needs no gathering
            return [await asked[0].answer]
        return await asyncio.gather(*(one.answer for one in asked))

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        batch = self._next()
        try:
            if batch:
                self._answer(batch, loop)
        finally:
            with self._lock:
                goes_on = self._is_running = bool(self._waiting)
            if goes_on:
                self._worker.submit(self._run, loop)  # behind what else has been asked of the worker

    def _next(self) -> list[_Waiting[Item, Outcome]]:
        batch: list[_Waiting[Item, Outcome]] = []
        while self._waiting and len(batch) < self._max_items:
            one = self._waiting.popleft()
            if not one.answer.cancelled():
                batch.append(one)
        return batch

    def _answer(self, batch: Sequence[_Waiting[Item, Outcome]], loop: asyncio.AbstractEventLoop) -> None:
        started_s = time.perf_counter()
        try:
            with collected_ms() as stages_ms:
                outcomes = self._work([one.item for one in batch])
        except Exception as error:
            if len(batch) == 1:
                loop.call_soon_threadsafe(_fail, batch, error)
            else:  # one item's error is nobody else's
                for one in batch:
                    self._answer([one], loop)
            return
        stages_ms["score"] = (time.perf_counter() - started_s) * 1000 - sum(stages_ms.values())
        times = [Times((started_s - one.since_s) * 1000, stages_ms) for one in batch]
        loop.call_soon_threadsafe(_deliver, batch, outcomes, times)
        self._account(times)


def _deliver(batch: Sequence[_Waiting[Item, Outcome]], outcomes: Sequence[Outcome], times: Sequence[Times]) -> None:
    for one, outcome, took in zip(batch, outcomes, times, strict=True):
        if not one.answer.done():
            one.answer.set_result((outcome, took))


def _fail(batch: Sequence[_Waiting[Item, Outcome]], error: Exception) -> None:
    for one in batch:
        if not one.answer.done():
            one.answer.set_exception(error)
