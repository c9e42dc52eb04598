"""Nobody is scored whose caller has gone: callers that time out would keep the scorer busy with answers that nobody reads."""

import asyncio
import json
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serve_apps.access import Gate
from serve_apps.access_log import AccessLog, Call
from serve_apps.batcher import MicroBatcher
from serve_apps.desk import Desk
from serve_apps.direct import DirectServer
from serve_apps.metrics import ReplicaMetrics
from serve_apps.peers import Peers

HOST = "127.0.0.1"


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.001)


def test_who_hangs_up_before_the_batch_is_left_out_of_it_and_noted(tmp_path: Path) -> None:
    may_go, batches = threading.Event(), list[list[int]]()

    def score(numbers: list[int]) -> list[int]:
        batches.append(numbers)
        assert may_go.wait(10)
        return numbers

    log, gate = AccessLog(str(tmp_path), "me"), Gate(None, timeout_s=10, max_body_bytes=100)
    desk = Desk(gate, ReplicaMetrics(), log)

    async def run(worker: ThreadPoolExecutor) -> None:
        batcher = MicroBatcher(worker, score, 9, lambda _: None)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async def work(_: Call) -> str:
                [(outcome, _times)] = await batcher.ask(int(await gate.body(Request(scope, receive))))
                return str(outcome)

            outcome = await desk.attempt("score", {}, work)
            await PlainTextResponse(str(outcome))(scope, receive, send)

        server = DirectServer(HOST, None, 9, 1, lambda: None)
        server.serve(app, ends_within_s=10)
        async with httpx.AsyncClient(timeout=10) as client:
            first = asyncio.ensure_future(client.post(server.url, content=b"1"))
            await until(lambda: batches == [[1]])
            gone = [await asyncio.open_connection(HOST, int(server.url.rpartition(":")[2])) for _ in range(3)]
            for _, writer in gone:
                writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n2")
            await until(lambda: len(batcher) == 3)
            last = asyncio.ensure_future(client.post(server.url, content=b"3"))
            await until(lambda: len(batcher) == 4)
            for _, writer in gone:
                writer.close()
            await until(lambda: server.num_ongoing == 2)
            may_go.set()
            assert [answer.text for answer in await asyncio.gather(first, last)] == ["1", "3"]
        await server.close()

    try:
        with ThreadPoolExecutor(1) as worker:
            asyncio.run(run(worker))
    finally:
        may_go.set()
    assert batches == [[1], [3]]
    log.close()
    lines = map(json.loads, (tmp_path / "access_me.jsonl").read_text().splitlines())
    assert sorted(line["status"] for line in lines) == [200, 200, 499, 499, 499]


class Unanswered:
    """A call of Serve's to another replica, and the handle that makes it."""

    def __init__(self) -> None:
        self.num_begun = self.num_cancelled = 0

    def options(self, **_: Any) -> "Unanswered":
        return self

    def remote(self, *_: Any) -> "Unanswered":
        self.num_begun += 1
        return self

    def __await__(self) -> Generator[Any, None, None]:
        yield from asyncio.sleep(10).__await__()

    def cancel(self) -> None:
        self.num_cancelled += 1


def test_what_another_replica_was_asked_for_is_given_up_with_the_call() -> None:
    async def method() -> None: ...

    async def run() -> None:
        peers, handle = Peers(), Unanswered()
        peers._handle = handle  # type: ignore[assignment]
        call = asyncio.ensure_future(peers.ask_owner("1", method))
        await until(lambda: handle.num_begun == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert handle.num_cancelled == 1

    asyncio.run(run())
