"""Requests wait for the scorer only while it is busy, and nobody is scored who no longer waits."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from serve_apps.batcher import MicroBatcher, Times, with_error_for_future


class Scorer:
    """Doubles numbers, each batch when it may; keeps what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may_go = threading.Semaphore(0)

    def score(self, numbers: list[int]) -> list[int]:
        self.batches.append(numbers)
        assert self.may_go.acquire(timeout=10)
        if -1 in numbers:
            raise RuntimeError("broken")
        return [2 * number for number in numbers]


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


async def until(is_so: object) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # type: ignore[operator]
            await asyncio.sleep(0.001)


def test_a_lone_request_is_scored_at_once_and_those_that_come_meanwhile_are_the_next_batches(
    worker: ThreadPoolExecutor,
) -> None:
    scorer, told = Scorer(), list[int]()
    batcher = MicroBatcher(worker, scorer.score, 3, lambda times: told.append(len(times)))

    async def run() -> list[tuple[int, Times]]:
        calls = [asyncio.ensure_future(batcher.ask(1))]
        await until(lambda: scorer.batches == [[1]])
        calls += [asyncio.ensure_future(batcher.ask(number)) for number in (2, 3)]
        calls.append(asyncio.ensure_future(batcher.ask(4, 5)))
        await until(lambda: len(batcher) == 4)
        between = worker.submit(lambda: len(scorer.batches))
        scorer.may_go.release(3)
        answers = [answer for call in calls for answer in await call]
        assert between.result() == 1  # what else is asked of the worker does not wait for the queue to be empty
        await until(lambda: len(told) == 3)  # after the answers
        return answers

    answers = asyncio.run(run())
    assert [outcome for outcome, _ in answers] == [2, 4, 6, 8, 10]
    assert scorer.batches == [[1], [2, 3, 4], [5]]
    assert told == [1, 3, 1]
    assert all(times.queue_ms >= 0 and times.batch_ms["score"] > 0 for _, times in answers)


def test_who_has_given_up_is_left_out(worker: ThreadPoolExecutor) -> None:
    scorer = Scorer()
    batcher = MicroBatcher(worker, scorer.score, 2, lambda _: None)

    async def run() -> None:
        first = asyncio.ensure_future(batcher.ask(1))
        await until(lambda: scorer.batches == [[1]])
        late, last = (asyncio.ensure_future(batcher.ask(number)) for number in (2, 4))
        await until(lambda: len(batcher) == 2)
        late.cancel()
        await asyncio.sleep(0)
        scorer.may_go.release(2)
        assert [outcome for outcome, _ in [*await first, *await last]] == [2, 8]
        assert late.cancelled()

    asyncio.run(run())
    assert scorer.batches == [[1], [4]]


def test_an_item_that_cannot_be_scored_fails_alone(worker: ThreadPoolExecutor) -> None:
    scorer = Scorer()
    scorer.may_go.release(4)
    batcher = MicroBatcher(worker, scorer.score, 3, lambda _: None)

    async def run() -> None:
        all_wait = threading.Event()
        worker.submit(all_wait.wait, 10)
        good, broken, better = (asyncio.ensure_future(batcher.ask(number)) for number in (1, -1, 3))
        await until(lambda: len(batcher) == 3)
        all_wait.set()
        with pytest.raises(RuntimeError, match="broken"):
            await broken
        assert [outcome for outcome, _ in [*await good, *await better]] == [2, 6]

    asyncio.run(run())
    assert scorer.batches == [[1, -1, 3], [1], [-1], [3]]


def test_a_bug_that_raises_what_no_future_takes_leaves_nobody_waiting(worker: ThreadPoolExecutor) -> None:
    def score(numbers: list[int]) -> list[int]:
        return [next(iter(())) if number < 0 else number for number in numbers]

    batcher = MicroBatcher(worker, score, 3, lambda _: None)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10):
            with pytest.raises(RuntimeError, match="StopIteration"):
                await batcher.ask(-1)
            with pytest.raises(RuntimeError, match="StopIteration"):
                await loop.run_in_executor(worker, with_error_for_future, score, [-1])
            [(outcome, _)] = await batcher.ask(2)
            assert outcome == 2

    asyncio.run(run())


class Reader:
    """Answers what has been read; tells, of users below 10, to come again when it has been. Items are (user, number)."""

    def __init__(self) -> None:
        self.reads: dict[int, Future[None]] = {}
        self.answered: list[tuple[int, int]] = []

    def score(self, asked: list[tuple[int, int]]) -> list[tuple[int, int] | Future[None]]:
        outcomes: list[tuple[int, int] | Future[None]] = []
        for user, number in asked:
            read = self.reads.setdefault(user, Future()) if user < 10 else None
            if read and not read.done():
                outcomes.append(read)
            else:
                self.answered.append((user, number))
                outcomes.append((user, number))
        return outcomes


def test_others_go_on_while_something_is_read_for_a_user_whose_requests_keep_their_order(
    worker: ThreadPoolExecutor,
) -> None:
    reader = Reader()
    batcher = MicroBatcher(worker, reader.score, 3, lambda _: None, key=lambda asked: asked[0])

    async def run() -> None:
        aside = [asyncio.ensure_future(batcher.ask((1, 0), (1, 1)))]
        await until(lambda: 1 in reader.reads)
        for number in range(10):
            [(outcome, times)] = await batcher.ask((10 + number, 0))
            assert (outcome, times.aside_ms) == ((10 + number, 0), 0)
        aside += [asyncio.ensure_future(batcher.ask((1, number))) for number in (2, 3)]
        gone = asyncio.ensure_future(batcher.ask((1, 4)))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0)
        reader.reads[1].set_result(None)
        took = [times.aside_ms for call in aside for _, times in await call]
        assert took[0] > 5

    asyncio.run(run())
    assert [number for user, number in reader.answered if user == 1] == [0, 1, 2, 3]


def test_a_read_that_fails_unforeseen_fails_those_who_wait_for_it_and_nobody_later(worker: ThreadPoolExecutor) -> None:
    reader = Reader()
    batcher = MicroBatcher(worker, reader.score, 3, lambda _: None, key=lambda asked: asked[0])

    async def run() -> None:
        waits = asyncio.ensure_future(batcher.ask((1, 0)))
        await until(lambda: 1 in reader.reads)
        reader.reads.pop(1).set_exception(RuntimeError("broken"))
        with pytest.raises(RuntimeError, match="broken"):
            await waits
        later = asyncio.ensure_future(batcher.ask((1, 1)))
        await until(lambda: 1 in reader.reads)
        reader.reads[1].set_result(None)
        assert [outcome for outcome, _ in await later] == [(1, 1)]

    asyncio.run(run())
