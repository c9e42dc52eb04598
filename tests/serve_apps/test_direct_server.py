"""A replica's own port, without Serve: what has no room, who is answered before the end, and what strangers may hold."""

import asyncio
import gc
import socket
import struct
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from longer.errors import UserError
from serve_apps import bounded_http
from serve_apps.bounded_http import IS_ACCEPTED
from serve_apps.direct import DirectServer

HOST = "127.0.0.1"
HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
CLOSE = b"connection: close\r\n"


class Slow:
    """Answers once it may, strangers too."""

    def __init__(self, may_end: bool = False) -> None:
        self.may_end, self.num_begun = asyncio.Event(), 0
        if may_end:
            self.may_end.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_begun += 1
        await self.may_end.wait()
        scope["state"][IS_ACCEPTED] = scope["path"] != "/stranger"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


def serving(app: ASGIApp, host: str = HOST, places: int = 9) -> tuple[DirectServer, list[int]]:
    """In the running event loop; and what it refuses."""
    refusals = list[int]()
    server = DirectServer(host, None, places, retry_after_s=7, on_refused=lambda: refusals.append(1))
    server.serve(app, ends_within_s=10)
    return server, refusals


def test_what_has_no_room_is_told_to_come_back_and_who_has_it_is_answered_before_the_end() -> None:
    async def run() -> None:
        slow = Slow()
        server, refusals = serving(slow, places=2)
        async with httpx.AsyncClient(timeout=10) as client:
            asked = [asyncio.ensure_future(client.get(server.url)) for _ in range(2)]
            while slow.num_begun < 2:
                await asyncio.sleep(0.01)
            refused = await client.get(server.url)
            assert (refused.status_code, refused.headers["retry-after"], server.num_ongoing) == (503, "7", 2)
            assert len(refusals) == 1
            closing = asyncio.ensure_future(server.close())
            await asyncio.sleep(0.3)
            assert not closing.done()
            slow.may_end.set()
            assert [answer.text for answer in await asyncio.gather(*asked)] == ["ok", "ok"]
            await closing
            with pytest.raises(httpx.ConnectError):
                await client.get(server.url)

    asyncio.run(run())


def test_an_address_that_is_not_the_nodes_is_a_mistake_with_its_remedy() -> None:
    for host in ("203.0.113.1", "no address"):
        with pytest.raises(UserError, match=f"direct_host={host}: use an IP address"):
            DirectServer(host, None, 1, 1, lambda: None)


def taken_before_a_free_one() -> socket.socket:
    """A port that is taken; nobody has the next one."""
    while True:
        taken = socket.create_server((HOST, 0))
        with suppress(OSError), socket.create_server((HOST, taken.getsockname()[1] + 1)):
            return taken
        taken.close()


def test_replicas_of_a_node_share_a_range_of_ports_and_one_too_many_is_told_so() -> None:
    with taken_before_a_free_one() as taken:
        first = taken.getsockname()[1]
        second = DirectServer(HOST, (first, first + 1), 1, 1, lambda: None)
        assert second.url == f"http://{HOST}:{first + 1}"
        with pytest.raises(UserError, match=f"direct_ports={first}-{first + 1}: .* a port for each"):
            DirectServer(HOST, (first, first + 1), 1, 1, lambda: None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_every_interface_is_told_as_an_address_that_answers(host: str) -> None:
    async def run() -> None:
        server, _ = serving(Slow(may_end=True), host)
        async with httpx.AsyncClient(timeout=10) as client:
            assert (await client.get(server.url)).text == "ok"
        await server.close()

    asyncio.run(run())


def test_an_answer_waits_for_no_acknowledgement_of_the_one_before() -> None:
    """40 ms a call, where the event loop does not see that a socket speaks TCP."""

    async def run() -> None:
        server, _ = serving(Slow(may_end=True))
        async with httpx.AsyncClient(timeout=10) as client:
            await client.get(server.url)
            began_s = time.perf_counter()
            for _ in range(10):
                await client.get(server.url)
            assert time.perf_counter() - began_s < 0.3
        await server.close()

    asyncio.run(run())


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.001)


async def is_cut(reader: asyncio.StreamReader, within_s: float = 5) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), within_s) == b""
    except ConnectionError:
        return True


def test_a_head_without_an_end_is_cut_before_it_fills_the_memory() -> None:
    """No token is asked for before its end."""

    async def run() -> None:
        server, _ = serving(Slow(may_end=True))
        port = int(server.url.rpartition(":")[2])
        for start, more in ((b"GET /", b"x"), (b"GET / HTTP/1.1\r\n", b"a: b\r\n")):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(start)
            with suppress(ConnectionError):
                for _ in range(100):
                    writer.write(more * (64 << 10))
                    await writer.drain()
            assert await is_cut(reader)
        async with httpx.AsyncClient(timeout=10) as client:  # a long body is no long head
            assert (await client.post(server.url, content=b"x" * (1 << 20))).text == "ok"
        await server.close()

    asyncio.run(run())


def test_silent_connections_are_cut_and_there_are_never_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "REQUEST_WITHIN_S", 0.5)
    monkeypatch.setattr(bounded_http, "MOST_CONNECTIONS", 5)

    async def run() -> None:
        server, _ = serving(Slow(may_end=True))
        port = int(server.url.rpartition(":")[2])
        silent = [await asyncio.open_connection(HOST, port) for _ in range(5)]
        one_more, _ = await asyncio.open_connection(HOST, port)
        assert await is_cut(one_more, 0.3)
        assert all([await is_cut(reader) for reader, _ in silent])
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(HEAD)
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.7)
        writer.write(HEAD + b"GET")  # who has been answered may come again, but not with half of a head
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        assert await is_cut(reader)
        await server.close()

    asyncio.run(run())


def test_strangers_who_are_answered_hold_a_connection_no_longer_than_those_who_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thousand who ask for the health once a minute would leave no room for callers."""
    monkeypatch.setattr(bounded_http, "REQUEST_WITHIN_S", 0.5)

    async def run() -> None:
        server, _ = serving(Slow(may_end=True))
        (caller, asks), (stranger, looks) = await opened(server), await opened(server)
        for writer, path in ((asks, b"/"), (looks, b"/stranger")):
            writer.write(HEAD.replace(b"/", path, 1))
        for reader in (caller, stranger):
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        assert await is_cut(stranger)
        asks.write(HEAD)
        assert (await caller.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        await server.close()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_connection_that_is_reset_while_it_idles_is_not_held_in_memory() -> None:
    """Callers behind a proxy that resets what idles would leave theirs there for 75 seconds each."""

    async def run() -> None:
        server, _ = serving(Slow(may_end=True))
        with socket.create_connection((HOST, int(server.url.rpartition(":")[2]))) as caller:
            caller.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )  # so that to close is to reset
            await asyncio.to_thread(caller.sendall, HEAD)
            assert (await asyncio.to_thread(caller.recv, 1000)).startswith(b"HTTP/1.1 200")
            connections = server._server.server_state.connections
            [held] = map(weakref.ref, connections)
        await until(lambda: not connections)
        gc.collect()
        assert held() is None
        await server.close()

    asyncio.run(asyncio.wait_for(run(), 20))


async def opened(server: DirectServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(HOST, int(server.url.rpartition(":")[2]))


def test_what_comes_after_a_body_is_cut_before_it_fills_the_memory_as_headers_do() -> None:
    """Trailers are kept with the headers, though the request has long been refused."""

    async def run() -> None:
        server, _ = serving(Slow(may_end=True))
        head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        for start, more in ((b"1\r\nx\r\n0\r\n", b"a: b\r\n"), (b"0\r\na: ", b"x")):
            reader, writer = await opened(server)
            writer.write(head + start)
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            with suppress(ConnectionError):
                for _ in range(100):
                    writer.write(more * (64 << 10))
                    await writer.drain()
            assert await is_cut(reader)
        reader, writer = await opened(server)
        for _ in range(2):  # a body in many pieces, and some trailers, are no such thing
            writer.write(head + b"400\r\n" + b"x" * 1024 + b"\r\n")
            for _ in range(1000):
                writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
                await writer.drain()
            writer.write(b"0\r\na: b\r\n\r\n")
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        await server.close()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_requests_sent_all_at_once_do_not_wait_in_memory() -> None:
    """Each of some twenty bytes would be a scope, events and a place in line, of a kilobyte."""

    async def run() -> None:
        slow = Slow()
        server, _ = serving(slow)
        reader, writer = await opened(server)
        writer.write(HEAD * 1000)
        assert (await reader.read(1000)).startswith(b"HTTP/1.1 400")
        assert await is_cut(reader)
        assert slow.num_begun == 1
        slow.may_end.set()
        await server.close()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_body_that_never_ends_holds_no_connection_though_it_has_been_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thousand such would leave no room for anybody else, for ever."""
    monkeypatch.setattr(bounded_http, "REQUEST_WITHIN_S", 0.5)

    async def run() -> None:
        server, _ = serving(Slow(may_end=True))
        reader, writer = await opened(server)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        writer.write(b"x")  # which ends the wait of a connection that has been answered
        assert await is_cut(reader)
        await server.close()

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize(
    ("num_bytes", "more", "num_left"),
    [(200_000, b"", 200_000), (40_000, b"", 40_000), (40_000, CLOSE, 40_000), (200_000, CLOSE, 10_000)],
    ids=str,
)
def test_who_does_not_read_an_answer_holds_neither_a_connection_nor_a_place(
    monkeypatch: pytest.MonkeyPatch, num_bytes: int, more: bytes, num_left: int
) -> None:
    """Who need not know the token could take all places, for ever: with a page of the documentation, again and again."""
    monkeypatch.setattr(bounded_http, "REQUEST_WITHIN_S", 0.5)

    def num_unread(connection: Any) -> int:
        return connection.transport.get_write_buffer_size()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(b"x" * num_bytes)(scope, receive, send)

    async def run() -> None:
        server, _ = serving(answer)
        server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that it takes but one answer
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((HOST, int(server.url.rpartition(":")[2])))
            deaf.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n" + more + b"\r\n")
            connections = server._server.server_state.connections
            await until(lambda: any(map(num_unread, connections)))
            while sum(map(num_unread, connections)) > num_left:
                await asyncio.to_thread(deaf.recv, 1000)
            await until(lambda: not connections and not server.num_ongoing)
        monkeypatch.setattr(bounded_http, "REQUEST_WITHIN_S", 5)
        async with httpx.AsyncClient(timeout=10) as client:  # who reads has all of it
            assert len((await client.get(server.url)).content) == num_bytes
        await server.close()

    asyncio.run(asyncio.wait_for(run(), 20))
