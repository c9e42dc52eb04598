"""Calls that go straight to a replica have the same answers and the same bounds as those through Serve's proxy."""

import asyncio
import json
import socket
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from longer import replica_urls
from longer.client import ScoringClient
from longer.errors import UserError
from longer.replica_urls import ReplicaUrls
from longer.ring import Ring, session_of
from serve_apps.direct import DirectServer
from tests.serve_apps.services import CANDIDATES, END_MS, HOST, Front, running
from tests.serving.tables import NUM_USERS, build_world

USERS = range(1, NUM_USERS + 1)
URLS: dict[str, str | None] = {"a": "http://10.0.0.1:5", "b": "http://10.0.0.2:5", "c": None}


@pytest.mark.ray
def test_a_users_calls_go_to_the_replica_that_has_the_state_with_the_scores_of_the_proxy(
    front: Front, tmp_path: Path
) -> None:
    with running(front, build_world(tmp_path), num_replicas=2, max_replicas=2, direct_host=HOST) as url:
        urls = httpx.get(f"{url}/v1/replicas", timeout=30).json()["urls"]
        ring = Ring(urls)
        assert len(set(urls.values())) == 2
        straight, proxied = ScoringClient(url, timeout_s=30), ScoringClient(url, timeout_s=30, direct=False)
        for user in USERS:
            body = {"user_id": user, "candidates": CANDIDATES, "request_ts": END_MS}
            first = straight.score(**body)
            again, other = proxied.score(**body), straight.score(**body)
            assert [one["user_state"]["source"] for one in (first, again, other)] == ["load", "hit", "hit"]
            assert first["scores"] == again["scores"] == other["scores"]
            its = urls[ring.owner(session_of(user))]
            there = httpx.post(f"{its}/v1/score", json=body, headers={"x-session-id": session_of(user)}, timeout=30)
            assert (there.json()["user_state"]["source"], there.headers["x-replica"]) == (
                "hit",
                ring.owner(session_of(user)),
            )
        told = httpx.get(f"{url}/v1/status", timeout=30).json()["replicas"]
        assert [one["lost_affinity"] for one in told] == [{"no_session": 0, "other_replica": 0}] * 2
        _bounds_hold(urls[ring.owner("1")])


def _bounds_hold(url: str) -> None:
    """Half a body, random bytes, and a body that is no request are refused, and the replica is well afterwards."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as half:
        half.sendall(b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    with socket.create_connection((host, int(port)), timeout=10) as noise:
        noise.sendall(bytes(range(256)) + b"\r\n\r\n")
        assert noise.recv(100).startswith(b"HTTP/1.1 400")
    wrong = httpx.post(f"{url}/v1/score", content=b"{", timeout=10)
    assert (wrong.status_code, list(wrong.json())) == (400, ["error"])
    assert httpx.get(f"{url}/readyz", timeout=10).json() == {"status": "ready"}


class Slow:
    """Answers once it may."""

    def __init__(self) -> None:
        self.may_end, self.num_begun = asyncio.Event(), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_begun += 1
        await self.may_end.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


def test_what_has_no_room_is_told_to_come_back_and_who_has_it_is_answered_before_the_end() -> None:
    async def run() -> None:
        server, slow = DirectServer(HOST, most_ongoing=2, retry_after_s=7), Slow()
        server.serve(lambda: slow, ends_within_s=10)
        async with httpx.AsyncClient(timeout=10) as client:
            asked = [asyncio.ensure_future(client.get(server.url)) for _ in range(2)]
            while slow.num_begun < 2:
                await asyncio.sleep(0.01)
            refused = await client.get(server.url)
            assert (refused.status_code, refused.headers["retry-after"], server.num_ongoing) == (503, "7", 2)
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
            DirectServer(host, most_ongoing=1, retry_after_s=1)


class Told:
    """What a service tells of its replicas, and how often it was asked."""

    def __init__(self, urls: Mapping[str, str | None]) -> None:
        self.urls, self.num_asked = urls, 0

    def __call__(self) -> Mapping[str, str | None]:
        self.num_asked += 1
        return self.urls


def test_a_replica_that_cannot_be_reached_is_left_alone_for_a_while_and_its_successors_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr(replica_urls.time, "monotonic", lambda: now_s)
    told = Told(URLS)
    found = ReplicaUrls("http://service", told)
    assert {found.of(str(user)) for user in range(100)} == set(URLS.values())
    [session, *_] = [str(user) for user in range(100) if found.of(str(user)) == URLS["a"]]
    found.avoid("http://10.0.0.1:5")
    assert (found.of(session), told.num_asked) == (None, 2)
    told.urls = {**URLS, "a": "http://10.0.0.3:5"}
    now_s += 11
    assert (found.of(session), told.num_asked) == ("http://10.0.0.3:5", 3)
    told.urls = URLS
    now_s += 20
    assert found.of(session) == "http://10.0.0.1:5"
    told.urls = {}
    now_s += 11
    assert found.of(session) is None


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
    assert ReplicaUrls(front, lambda: {"a": replica}).of("1") == (replica if is_used else None)


def test_a_service_whose_replicas_are_gone_or_full_is_asked_through_its_proxy() -> None:
    """At the first attempt, without a pause: nothing has been done twice."""
    replies = {"gone": "http://127.0.0.1:9"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answer = {"urls": replies} if scope["path"] == "/v1/replicas" else {"scores": {}}
        body = json.dumps(answer).encode()
        head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
        await send(head)
        await send({"type": "http.response.body", "body": body})

    async def run() -> None:
        server, full = DirectServer(HOST, 100, 1), DirectServer(HOST, 0, 60)
        server.serve(lambda: app, ends_within_s=1)
        full.serve(lambda: app, ends_within_s=1)
        client = ScoringClient(server.url, max_retries=0)
        assert await asyncio.to_thread(client.score, 1, [1]) == {"scores": {}}
        replies["gone"] = full.url
        assert await asyncio.to_thread(ScoringClient(server.url, max_retries=0).score, 1, [1]) == {"scores": {}}
        await asyncio.gather(server.close(), full.close())

    asyncio.run(run())
