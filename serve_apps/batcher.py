"""Requests that wait for the scorer, taken together when it is free. No torch, no Ray.

No timer: a request that finds the scorer idle is scored at once, and those that come meanwhile wait for that batch to end and
make the next one. So batches are as large as the load makes them, and a request waits for one batch besides those ahead of it.

What cannot be scored before something has been read says so with a future, is set aside, and joins a later batch, ahead of those
who came after it; others go on meanwhile. What has its key (its user) and came after it is set aside with it: their order stays.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Generic, TypeVar

from longer.serving.stages import collected_ms

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Times:
    """Milliseconds that an item waited for its batch, and of the whole batch by stage; `score` is all without another name.

    `aside_ms` is how long it was set aside, which `queue_ms` does not count.
    """

    queue_ms: float
    aside_ms: float
    batch_ms: Mapping[str, float]


@dataclass(eq=False)
class _Waiting(Generic[Item, Outcome]):
    item: Item
    answer: "asyncio.Future[tuple[Outcome, Times]]"
    since_s: float
    aside_since_s: float = 0.0
    aside_s: float = 0.0


class MicroBatcher(Generic[Item, Outcome]):
    """Runs `work` on batches of at most `max_items`, in the one thread of `worker`, between whatever else is asked of that.

    `account` is told of every batch when its callers have been answered. A batch that fails is tried again item by item: `work` may
    be repeated. It may give an item a future instead of an outcome, and is given the item again when that is done.
    """

    def __init__(
        self,
        worker: Executor,
        work: Callable[[list[Item]], Sequence[Outcome | Future[None]]],
        max_items: int,
        account: Callable[[Sequence[Times]], None],
        key: Callable[[Item], Hashable] = id,
    ) -> None:
        self._worker, self._work, self._max_items, self._account = worker, work, max_items, account
        self._key = key
        self._waiting: deque[_Waiting[Item, Outcome]] = deque()
        self._aside = dict[Hashable, list[_Waiting[Item, Outcome]]]()
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
        with self._lock:
            while self._waiting and len(batch) < self._max_items:
                one = self._waiting.popleft()
                if not one.answer.cancelled() and not self._goes_aside(one):
                    batch.append(one)
        return batch

    def _goes_aside(self, one: _Waiting[Item, Outcome]) -> bool:
        """Whether something of its key is set aside, and this now too. With the lock."""
        if (others := self._aside.get(self._key(one.item))) is None:
            return False
        one.aside_since_s = time.perf_counter()
        others.append(one)
        return True

    def _answer(self, batch: Sequence[_Waiting[Item, Outcome]], loop: asyncio.AbstractEventLoop) -> None:
        started_s = time.perf_counter()
        try:
            with collected_ms() as stages_ms:
                outcomes = with_error_for_future(self._work, [one.item for one in batch])
        except Exception as error:
            if len(batch) == 1:
                loop.call_soon_threadsafe(_fail, batch, error)
            else:  # one item's error is nobody else's
                self._answer_one_by_one(batch, loop)
            return
        stages_ms["score"] = (time.perf_counter() - started_s) * 1000 - sum(stages_ms.values())
        answered, later = list[tuple[_Waiting[Item, Outcome], Outcome]](), list[tuple[_Waiting, Future[None]]]()
        for one, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Future):
                later.append((one, outcome))
            else:
                answered.append((one, outcome))
        self._set_aside(later, loop)
        if answered:
            times = [
                Times((started_s - one.since_s - one.aside_s) * 1000, one.aside_s * 1000, stages_ms)
                for one, _ in answered
            ]
            loop.call_soon_threadsafe(_deliver, answered, times)
            self._account(times)

    def _answer_one_by_one(self, batch: Sequence[_Waiting[Item, Outcome]], loop: asyncio.AbstractEventLoop) -> None:
        for one in batch:
            with self._lock:
                is_aside = self._goes_aside(one)
            if not is_aside:
                self._answer([one], loop)

    def _set_aside(
        self, later: Sequence[tuple[_Waiting[Item, Outcome], Future[None]]], loop: asyncio.AbstractEventLoop
    ) -> None:
        """All of them first: a future that is done takes its key's back at once."""
        futures = dict[Hashable, Future[None]]()
        with self._lock:
            for one, future in later:
                if not self._goes_aside(one):
                    key = self._key(one.item)
                    futures[key], self._aside[key] = future, []
                    self._goes_aside(one)
        for key, future in futures.items():
            future.add_done_callback(partial(self._take_back, key, loop))

    def _take_back(self, key: Hashable, loop: asyncio.AbstractEventLoop, done: Future[None]) -> None:
        with self._lock:
            back = self._aside.pop(key)
            if (error := done.exception()) is None:
                now_s = time.perf_counter()
                for one in back:
                    one.aside_s += now_s - one.aside_since_s
                self._waiting.extendleft(reversed(back))
                starts, self._is_running = not self._is_running, True
        if error is not None:
            loop.call_soon_threadsafe(_fail, back, error)
        elif starts:
            self._worker.submit(self._run, loop)


def with_error_for_future(function: Callable[..., Returned], *args: Any) -> Returned:
    """What the function returns; a StopIteration, which is a bug, becomes an error that a future takes: else its caller waits."""
    try:
        return function(*args)
    except StopIteration as error:
        raise RuntimeError("StopIteration where nothing is iterated") from error


def _deliver(answered: Sequence[tuple[_Waiting[Item, Outcome], Outcome]], times: Sequence[Times]) -> None:
    for (one, outcome), took in zip(answered, times, strict=True):
        if not one.answer.done():
            one.answer.set_result((outcome, took))


def _fail(batch: Sequence[_Waiting[Item, Outcome]], error: BaseException) -> None:
    for one in batch:
        if not one.answer.done():
            one.answer.set_exception(error)
