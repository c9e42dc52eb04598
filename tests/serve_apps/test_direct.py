"""Calls that go straight to a replica have the same answers and the same bounds as those through Serve's proxy."""

import socket
import time
from pathlib import Path

import httpx
import pytest

from longer.client import ScoringClient
from longer.ring import Ring, session_of
from tests.serve_apps.services import CANDIDATES, END_MS, HOST, Front, running
from tests.serving.tables import NUM_USERS, build_world

USERS = range(1, NUM_USERS + 1)
TOKEN = "a token of tests"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.mark.ray
def test_a_users_calls_go_to_the_replica_that_has_the_state_with_the_scores_of_the_proxy(
    front: Front, tmp_path: Path
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    how = {"num_replicas": 2, "max_replicas": 2, "direct_host": HOST, "token_file": str(token_file)}
    with running(front, build_world(tmp_path), **how) as url:
        ring = Ring(urls := _urls(url))
        straight, proxied = (ScoringClient(url, TOKEN, timeout_s=30, direct=direct) for direct in (True, False))
        for user in USERS:
            body = {"user_id": user, "candidates": CANDIDATES, "request_ts": END_MS}
            first = straight.score(**body)
            again, other = proxied.score(**body), straight.score(**body)
            assert [one["user_state"]["source"] for one in (first, again, other)] == ["load", "hit", "hit"]
            assert first["scores"] == again["scores"] == other["scores"]
            owner = ring.owner(session_of(user))
            about = {**BEARER, "x-session-id": session_of(user)}
            there = httpx.post(f"{urls[owner]}/v1/score", json=body, headers=about, timeout=30)
            assert (there.json()["user_state"]["source"], there.headers["x-replica"]) == ("hit", owner)
        assert (straight.num_direct, proxied.num_direct) == (2 * NUM_USERS, 0)
        several = [{"user_id": user, "candidates": CANDIDATES, "request_ts": END_MS} for user in USERS]
        for _ in range(4):  # any replica answers for all
            assert straight.score_batch(several) == proxied.score_batch(several)
        assert (straight.num_direct, proxied.num_direct) == (2 * NUM_USERS + 4, 0)
        told = httpx.get(f"{url}/v1/status", headers=BEARER, timeout=30).json()["replicas"]
        assert [one["lost_affinity"] for one in told] == [{"no_session": 0, "other_replica": 0}] * 2
        _bounds_hold(urls[ring.owner("1")])


def _urls(url: str) -> dict[str, str]:
    """Of both replicas, once each knows of the other, and the proxy of both."""
    deadline = time.monotonic() + 30
    while True:
        urls = _urls_by(url)
        ring, sessions = Ring(urls), map(session_of, USERS)
        knows_both = len(urls) == 2 and all(_urls_by(one) == urls for one in urls.values())
        if knows_both and all(ring.owner(session) == _replica_by_proxy(url, session) for session in sessions):
            break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert len(set(urls.values())) == 2
    return urls


def _urls_by(url: str) -> dict[str, str]:
    return httpx.get(f"{url}/v1/replicas", headers=BEARER, timeout=30).json()["urls"]


def _replica_by_proxy(url: str, session: str) -> str:
    return httpx.get(f"{url}/v1/model", headers={**BEARER, "x-session-id": session}, timeout=30).headers["x-replica"]


def _bounds_hold(url: str) -> None:
    """Half a body, random bytes, what has no token, is too large or is no request is refused; the replica is well afterwards."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as half:
        half.sendall(b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    with socket.create_connection((host, int(port)), timeout=10) as noise:
        noise.sendall(bytes(range(256)) + b"\r\n\r\n")
        assert noise.recv(100).startswith(b"HTTP/1.1 400")
    for headers, content, status in (
        (BEARER, b"{", 400),
        ({}, b"{}", 401),
        ({"authorization": "Bearer other"}, b"{}", 401),
        (BEARER, b" " * (2 << 20), 413),
        ({**BEARER, "x-timeout-ms": "x"}, b"{}", 422),
    ):
        wrong = httpx.post(f"{url}/v1/score", headers=headers, content=content, timeout=10)
        assert (wrong.status_code, list(wrong.json())) == (status, ["error"])
        assert (wrong.headers.get("connection") == "close") == (status == 401)
    assert httpx.get(f"{url}/v1/replicas", timeout=10).status_code == 401
    assert httpx.get(f"{url}/readyz", timeout=10).json() == {"status": "ready"}
