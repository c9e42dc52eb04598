"""What keeps a service up and its secrets in: token, deadline, a bounded queue, quiet logs."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray

from longer.errors import UserError
from serve_apps.arguments import ScoringArgs, resolved
from tests.serve_apps.services import Front, running
from tests.serving.tables import START_MS, build_world

TOKEN = "correct-horse-battery"
USER = 730_550_112_233
ITEM = "item-of-nobodys-business"
BEARER = {"authorization": f"Bearer {TOKEN}"}
BODY = {"user_id": USER, "candidates": [ITEM]}


@pytest.fixture(scope="module")
def url(front: Front, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that asks for a token and has little room."""
    folder = tmp_path_factory.mktemp("protection")
    (folder / "token").write_text(f"{TOKEN}\n")
    limits = {"max_batch_requests": 2, "max_queued_requests": 1}
    with running(front, build_world(folder), token_file=str(folder / "token"), **limits) as service:
        yield service


@pytest.mark.ray
def test_without_the_token_nothing_is_told_but_that_the_service_lives(url: str) -> None:
    for headers in ({}, {"authorization": TOKEN}, {"authorization": f"Bearer {TOKEN}x"}, {"authorization": "Bearer"}):
        for method, path in (
            ("POST", "score"),
            ("POST", "score:batch"),
            ("POST", "events"),
            ("DELETE", "users/5"),
            ("GET", "model"),
            ("GET", "stats"),
        ):
            response = httpx.request(method, f"{url}/v1/{path}", headers=headers, timeout=30)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
            assert TOKEN not in response.text
    assert httpx.get(f"{url}/healthz").status_code == httpx.get(f"{url}/readyz").status_code == 200
    assert httpx.post(f"{url}/v1/score", json=BODY, headers=BEARER).status_code == 200


@pytest.mark.ray
def test_a_request_is_answered_by_its_deadline_and_a_bad_deadline_is_told(url: str) -> None:
    def ask(timeout_ms: bytes) -> httpx.Response:
        headers = httpx.Headers([*BEARER.items(), ("x-timeout-ms", timeout_ms)])
        return httpx.post(f"{url}/v1/score", json=BODY, headers=headers, timeout=30)

    late = ask(b"1")
    assert (late.status_code, late.json()["error"][:20]) == (504, "not answered in time")
    assert ask(b"20000").status_code == 200
    for bad in (b"0", b"-1", b"soon", b"1e3", b"\xb2"):
        assert ask(bad).status_code == 422


@pytest.mark.ray
def test_what_does_not_fit_the_queue_is_told_when_to_come_back_and_nothing_is_lost(url: str) -> None:
    async def flood(num_requests: int) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=num_requests)) as http:
            calls = (http.post(f"{url}/v1/score", json=BODY, headers=BEARER) for _ in range(num_requests))
            return await asyncio.gather(*calls)

    responses = asyncio.run(flood(80))
    counts = Counter(response.status_code for response in responses)
    assert counts.keys() == {200, 503}, counts
    assert all(response.headers["retry-after"] == "1" for response in responses if response.status_code == 503)
    assert httpx.post(f"{url}/v1/score", json=BODY, headers=BEARER).status_code == 200


@pytest.mark.ray
def test_nothing_that_was_sent_is_in_a_log(url: str) -> None:
    event = {"item_id": ITEM, "event_ts": START_MS}
    for method, path, body in (
        ("POST", "score", {**BODY, "events": [event]}),
        ("POST", "score", {**BODY, "candidates": [{"id": ITEM, "features": {"price": ITEM}}]}),
        ("POST", "events", {"user_id": USER, "events": [event, {**event, "item_id": ""}]}),
        ("DELETE", f"users/{USER}", None),
    ):
        response = httpx.request(method, f"{url}/v1/{path}", json=body, headers=BEARER, timeout=30)
        assert response.status_code in (200, 422), response.text
        if response.status_code == 422:
            assert ITEM not in response.text
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    replica = httpx.get(f"{url}/v1/stats", headers=BEARER, timeout=30).json()["replica"]
    deadline, lines = time.monotonic() + 20, list[dict]()
    # Once the last call is written, all are; those without the token came long before.
    while not any((line["route"], line["status"]) == ("stats", 200) for line in lines):
        assert time.monotonic() < deadline, lines
        time.sleep(0.2)
        log = logs / "serve" / f"access_{replica}.jsonl"
        lines = list(map(json.loads, log.read_text().splitlines())) if log.exists() else []
    told = Counter((line["route"], line["status"], line["num_candidates"], line["source"]) for line in lines[-5:])
    assert told == Counter(
        [
            ("score", 200, 1, "load"),
            ("score", 422, 1, None),
            ("events", 422, 0, None),
            ("users", 200, 0, None),
            ("stats", 200, 0, None),
        ]
    )
    scored = next(line for line in lines if (line["route"], line["status"]) == ("score", 200))
    assert {"parse", "queue", "score", "answer"} <= scored["stages_ms"].keys()
    assert sum(scored["stages_ms"].values()) <= scored["latency_ms"] + 0.01
    assert scored["model_version"] == httpx.get(f"{url}/v1/model", headers=BEARER).json()["model_version"]
    found = [
        (file.name, secret)
        for file in logs.rglob("*")
        if file.is_file()
        for secret in (TOKEN, str(USER), ITEM)
        if secret.encode() in file.read_bytes()
    ]
    assert found == []


def test_a_service_built_with_a_token_is_not_open_where_a_replica_finds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ScoringArgs(checkpoint=build_world(tmp_path).path("checkpoints"))
    assert resolved(asked).token() is None
    monkeypatch.setenv("LONGER_SCORING_TOKEN", TOKEN)
    built = resolved(asked)
    assert built.token() == TOKEN
    monkeypatch.delenv("LONGER_SCORING_TOKEN")
    with pytest.raises(UserError, match="LONGER_SCORING_TOKEN: not set where this replica runs"):
        built.token()


def test_a_token_file_that_is_not_there_or_empty_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGER_SCORING_TOKEN", TOKEN)
    assert ScoringArgs(checkpoint="x").token() == TOKEN
    (tmp_path / "empty").write_text(" \n")
    for name, reason in (("nowhere", "cannot be read"), ("empty", "empty: write the token there")):
        with pytest.raises(UserError, match=reason):
            ScoringArgs(checkpoint="x", token_file=str(tmp_path / name)).token()
