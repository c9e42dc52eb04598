"""A client goes straight to a replica only where it should, and through the proxy where it cannot."""

import asyncio
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import requests
from starlette.types import Receive, Scope, Send

from longer import replica_urls
from longer.client import ScoringClient
from longer.errors import UserError
from longer.replica_urls import ReplicaUrls
from serve_apps.direct import DirectServer

HOST = "127.0.0.1"
URLS: dict[str, str | None] = {"a": "http://10.0.0.1:5", "b": "http://10.0.0.2:5", "c": None}


class Told:
    """What a service tells of its replicas, and how often it was asked."""

    def __init__(self, urls: Mapping[str, str | None]) -> None:
        self.urls: Mapping[str, str | None] | None = urls
        self.num_asked = 0

    def __call__(self) -> Mapping[str, str | None] | None:
        self.num_asked += 1
        return self.urls


@dataclass
class Clock:
    """What the client takes for the time."""

    now_s: float = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(replica_urls.time, "monotonic", lambda: clock.now_s)
    return clock


def test_a_replica_that_cannot_be_reached_is_left_alone_for_a_while_and_its_successors_are_asked_for(
    clock: Clock,
) -> None:
    told = Told(URLS)
    found = ReplicaUrls("http://service", told)
    assert {found.of(str(user)) for user in range(100)} == {("a", URLS["a"]), ("b", URLS["b"]), None}
    session = next(str(user) for user in range(100) if found.of(str(user)) == ("a", URLS["a"]))
    found.avoid("http://10.0.0.1:5")
    assert (found.of(session), told.num_asked) == (None, 2)
    told.urls = {**URLS, "a": "http://10.0.0.3:5"}
    clock.now_s += 11
    assert (found.of(session), told.num_asked) == (("a", "http://10.0.0.3:5"), 3)
    found.spare("http://10.0.0.3:5", for_s=2)
    assert (found.of(session), told.num_asked) == (None, 3)  # it is only full, and so is the proxy soon
    clock.now_s += 3
    assert found.of(session) == ("a", "http://10.0.0.3:5")
    told.urls = {}
    clock.now_s += 11
    assert found.of(session) is None


def test_a_call_of_several_users_goes_to_any_replica_that_can_be_reached(clock: Clock) -> None:
    found = ReplicaUrls("http://service", Told(URLS))
    assert {found.of(None) for _ in range(100)} == {("a", URLS["a"]), ("b", URLS["b"])}
    found.spare("http://10.0.0.1:5", for_s=2)
    assert {found.of(None) for _ in range(100)} == {("b", URLS["b"])}
    found.spare("http://10.0.0.2:5", for_s=2)
    assert found.of(None) is None
    clock.now_s += 3
    assert {found.of(None) for _ in range(100)} == {("a", URLS["a"]), ("b", URLS["b"])}


def test_a_service_too_busy_to_tell_its_replicas_does_not_bring_all_clients_to_its_proxy(clock: Clock) -> None:
    told = Told(URLS)
    found = ReplicaUrls("http://service", told)
    before = [found.of(str(user)) for user in range(100)]
    told.urls = None
    clock.now_s += 11
    assert ([found.of(str(user)) for user in range(100)], told.num_asked) == (before, 2)


@pytest.mark.parametrize(
    ("front", "replica", "is_used"),
    [
        ("https://service", "http://10.0.0.1:5", False),  # the token would go in clear
        ("http://service", "http://127.0.0.1:5", False),  # a port of the caller's own machine
        ("http://localhost:8321/scoring", "http://127.0.0.1:5", True),
        ("http://service", "http://[2001:db8::1]:5", True),
    ],
)
def test_a_call_goes_to_no_machine_and_by_no_protocol_that_was_not_asked_for(
    front: str, replica: str, is_used: bool
) -> None:
    assert ReplicaUrls(front, lambda: {"a": replica}).of("1") == (("a", replica) if is_used else None)


def test_a_replica_that_is_gone_full_silent_or_another_is_not_asked_again_and_the_proxy_is() -> None:
    """At the first attempt, without a pause, but for the one that took a call and kept silent: it may be at it still."""
    urls: dict[str, str] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answer = {"urls": urls} if scope["path"] == "/v1/replicas" else {"scores": {}}
        headers = [(b"content-type", b"application/json"), (b"x-replica", b"the front")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    def ask(client: ScoringClient) -> object:
        return client.score(1, [1])

    async def run() -> None:
        front, full, other = (DirectServer(HOST, None, places, 60, lambda: None) for places in (100, 0, 100))
        for server in (front, full, other):
            server.serve(app, ends_within_s=1)
        for url in ("http://127.0.0.1:9", full.url, other.url):
            urls["its"] = url
            client = ScoringClient(front.url, max_retries=0)
            for _ in range(2):
                assert await asyncio.to_thread(ask, client) == {"scores": {}}
            assert client.num_direct == 0
        with socket.create_server((HOST, 0)) as silent:
            urls["its"] = f"http://{HOST}:{silent.getsockname()[1]}"
            client = ScoringClient(front.url, timeout_s=0.5, max_retries=0)
            with pytest.raises(requests.ReadTimeout):
                await asyncio.to_thread(ask, client)
            assert await asyncio.to_thread(ask, client) == {"scores": {}}
        del urls["its"]
        urls["the front"] = front.url
        client = ScoringClient(front.url, max_retries=0)
        assert (await asyncio.to_thread(ask, client), client.num_direct) == ({"scores": {}}, 1)
        await asyncio.gather(front.close(), full.close(), other.close())

    asyncio.run(run())


def test_connections_to_many_replicas_stay_open() -> None:
    """`requests` keeps those to ten addresses: each call to one of more would open another one."""
    urls, connections = dict[str, str](), set[object]()

    def replica(name: str) -> DirectServer:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            connections.add(scope["client"])
            answer = {"urls": urls} if scope["path"] == "/v1/replicas" else {"scores": {}}
            headers = [(b"content-type", b"application/json"), (b"x-replica", name.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

        server = DirectServer(HOST, None, 100, 60, lambda: None)
        server.serve(app, ends_within_s=1)
        urls[name] = server.url
        return server

    def ask(client: ScoringClient) -> None:
        for user in [*range(50)] * 2:
            client.score(user, [1])

    async def run() -> None:
        servers = [replica(str(number)) for number in range(12)]
        client = ScoringClient(servers[0].url)
        await asyncio.to_thread(ask, client)
        assert (client.num_direct, len(connections)) == (100, len(servers))
        await asyncio.gather(*(server.close() for server in servers))

    asyncio.run(run())


def test_a_replica_that_asks_for_a_pause_has_it_and_is_asked_again_no_more_often_than_allowed() -> None:
    """As while the table cannot be read: asked again through the proxy at once, it would have twice the calls."""
    urls: dict[str, str] = {}
    num_proxied = 0

    async def replica(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"x-replica", b"its"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "cannot be read"}'})

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal num_proxied
        num_proxied += scope["path"] == "/v1/score"
        answer = {"urls": urls} if scope["path"] == "/v1/replicas" else {"scores": {}}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    def ask(url: str, max_retries: int) -> object:
        return ScoringClient(url, timeout_s=5, max_retries=max_retries).score(1, [1])

    async def run() -> None:
        front, its = (DirectServer(HOST, None, 100, 60, lambda: None) for _ in range(2))
        front.serve(proxy, ends_within_s=1)
        its.serve(replica, ends_within_s=1)
        urls["its"] = its.url
        with pytest.raises(UserError, match="cannot be read"):
            await asyncio.to_thread(ask, front.url, 0)
        assert num_proxied == 0
        began_s = time.monotonic()
        assert await asyncio.to_thread(ask, front.url, 1) == {"scores": {}}
        assert (num_proxied, time.monotonic() - began_s >= 1) == (1, True)
        await asyncio.gather(front.close(), its.close())

    asyncio.run(run())
