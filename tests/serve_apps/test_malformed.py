"""The service against what callers should not send: it stays up, says what is wrong, and does not grow.

`--malformed 10000` is the full size.
"""

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pyarrow as pa
import pytest
import ray
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from ray.serve.context import _get_global_client
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from longer.config import Settings
from serve_apps.arrow_body import ARROW
from tests.serve_apps.services import CANDIDATES, END_MS, HOST, Front, offline_scores, running
from tests.serve_apps.test_arrow_body import stream
from tests.serving.tables import START_MS, build_world, checkpoint_path

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
NUM_CLIENTS = 4
MOST_GROWTH_BYTES = 16 << 20
"""Twice of what 10,000 damaged bodies were seen to take, after the first 10,000."""
GOOD = {"user_id": 9, "candidates": ["item1", {"id": "item2", "features": {"price": 1.5}}], "top_k": 1}
EVENT = {"item_id": "item3", "event_ts": START_MS, "action": "buy", "features": {"price": 2}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return build_world(tmp_path_factory.mktemp("malformed"))


@pytest.fixture(scope="module")
def url(front: Front, world: Settings) -> Iterator[str]:
    limits = {"cache_bytes": 4 << 20, "events_bytes": 4 << 20, "max_body_bytes": 1 << 16, "direct_host": HOST}
    with running(front, world, **limits) as service:
        yield service


@pytest.fixture(scope="module")
def both(url: str) -> tuple[str, str]:
    """Serve's proxy, and the replica itself."""
    [direct] = httpx.get(f"{url}/v1/replicas", timeout=30).json()["urls"].values()
    return url, direct


@pytest.fixture(scope="module")
def expected(world: Settings) -> dict[int, np.ndarray]:
    """Offline scores by user."""
    return {user: scores for (_, user), scores in offline_scores(world, checkpoint_path(world)).items()}


def peak_bytes(url: str) -> int:
    return httpx.get(f"{url}/v1/stats", timeout=30).json()["peak_memory_bytes"]


def proxy_bytes() -> int:
    """The most that Serve's proxy has held in memory."""
    [proxy] = _get_global_client().get_serve_details()["proxies"].values()
    status = Path(f"/proc/{ray._private.state.actors(proxy['actor_id'])['Pid']}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def assert_well(url: str, expected: dict[int, np.ndarray]) -> None:
    """Users are answered the offline scores, once the events that malformed bodies may have brought are gone."""
    for user, wanted in expected.items():
        assert httpx.delete(f"{url}/v1/users/{user}", timeout=30).status_code == 200
        body = {"user_id": user, "candidates": CANDIDATES, "request_ts": END_MS}
        answer = httpx.post(f"{url}/v1/score", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        np.testing.assert_allclose(answer.json()["scores"]["label"], wanted, rtol=0, atol=1e-5)
    stats = httpx.get(f"{url}/v1/stats", timeout=30).json()
    for held in (stats["cache"], stats["online_events"]):
        assert held["bytes"] <= held["budget_bytes"]


@pytest.mark.ray
def test_the_service_does_what_its_openapi_document_says(
    url: str, both: tuple[str, str], expected: dict[int, np.ndarray], request: pytest.FixtureRequest
) -> None:
    operations = [found.ok() for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]
    assert len(operations) == 10
    places = cycle(both)
    num_each = max(request.config.getoption("--malformed") // (4 * len(operations)), 5)
    with requests.Session() as session:
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                if mode is GenerationMode.NEGATIVE and not operation.body:
                    continue

                @settings(max_examples=num_each, deadline=None, database=None, suppress_health_check=list(HealthCheck))
                @given(case=operation.as_strategy(generation_mode=mode))
                def keeps_to_it(case: Case) -> None:
                    response = case.call(base_url=next(places), session=session, timeout=30)
                    if response.status_code == 504 and "x-timeout-ms" in (case.headers or {}):
                        return  # it asked for an answer sooner than there could be one
                    case.validate_response(response, checks=CHECKS)

                keeps_to_it()
    assert_well(url, expected)


def damaged(rng: random.Random) -> tuple[str, str, bytes]:
    """A path, a content type and a body that was good before."""
    path, good = rng.choice(
        [("score", GOOD), ("score:batch", {"requests": [GOOD] * 3}), ("events", {"user_id": 9, "events": [EVENT] * 2})]
    )
    content_type, body = "application/json", bytearray(json.dumps(good).encode())
    if path == "score" and rng.random() < 0.5:
        columns = {"id": [f"item{n}" for n in range(50)], "price": np.arange(50, dtype=np.float32)}
        content_type, body = ARROW, bytearray(stream(columns, {"user_id": 9}))
    how = rng.randrange(6)
    if how == 0:
        body = body[: rng.randrange(len(body))]
    elif how == 1:
        body = bytearray(rng.randbytes(rng.randrange(2000)))
    elif how == 2:
        content_type = rng.choice(["text/plain", ARROW, "application/json", "", "application/json; charset=utf-16"])
    elif how == 3:
        at = rng.randrange(len(body))
        body[at:at] = rng.choice([b"[" * 5000, b'"', b"\x00", b"\xff" * 99, b"9" * 5000, b"-1e999", b"NaN", b"null"])
    else:
        for _ in range(rng.randrange(1, 6)):
            body[rng.randrange(len(body))] = rng.randrange(256)
    return path, content_type, bytes(body)


@pytest.mark.ray
def test_damaged_bodies_have_their_reason_and_leave_nothing_behind(
    url: str, both: tuple[str, str], expected: dict[int, np.ndarray], request: pytest.FixtureRequest
) -> None:
    num_requests = request.config.getoption("--malformed")
    assert_well(url, expected)

    def client(seed: int) -> Counter[int]:
        rng, counts = random.Random(seed), Counter[int]()
        with httpx.Client(timeout=30) as http:
            for _ in range(num_requests // NUM_CLIENTS):
                path, content_type, body = damaged(rng)
                answer = http.post(
                    f"{rng.choice(both)}/v1/{path}", content=body, headers={"content-type": content_type}
                )
                counts[answer.status_code] += 1
                assert answer.status_code in (200, 400, 413, 415, 422), (path, content_type, body, answer.text)
                if answer.status_code != 200:
                    assert "\n" not in answer.json()["error"]
                elif (path, content_type) == ("score", "application/json"):
                    told = answer.json()
                    assert len(told["candidates"]) == len(told["scores"]["label"]) > 0
                    assert all(0 <= score <= 1 for score in told["scores"]["label"])
        return counts

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        list(pool.map(client, range(NUM_CLIENTS)))  # what the allocator and the libraries take at first
        before, proxy_before, started = peak_bytes(url), proxy_bytes(), time.monotonic()
        counts = sum(pool.map(client, range(NUM_CLIENTS, 2 * NUM_CLIENTS)), Counter[int]())
    growth, proxy_growth = peak_bytes(url) - before, proxy_bytes() - proxy_before
    print(f"{counts.total()} in {time.monotonic() - started:.1f} s: {dict(counts)}")
    print(f"{growth / 2**20:.1f} MiB more at the replica's peak, {proxy_growth / 2**20:.1f} MiB more at the proxy's")
    assert counts[200] < counts.total() / 2
    assert max(growth, proxy_growth) < MOST_GROWTH_BYTES
    assert_well(url, expected)


@pytest.mark.ray
def test_bytes_that_are_no_http_end_their_own_connection_only(
    url: str, both: tuple[str, str], expected: dict[int, np.ndarray]
) -> None:
    rng = random.Random(0)
    for number in range(100):
        address = urlsplit(both[number // 2 % 2])
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            head = b"" if number % 2 else b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n"
            connection.sendall(head + rng.randbytes(rng.randrange(1, 5000)))
    assert_well(url, expected)


def half_sent(url: str, num_bytes: int, body: bytes) -> socket.socket:
    """A connection on which so many bytes are announced and these come."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=10)
    head = (
        f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {num_bytes}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.ray
def test_a_hundred_bodies_that_stop_half_way_hold_nobody_up_for_long(url: str, expected: dict[int, np.ndarray]) -> None:
    """Slow on purpose: each has one of the replica's 64 places until the two seconds of a body are over."""
    with ExitStack() as stack:
        stalled = [stack.enter_context(half_sent(url, 1000, b'{"user_id": 5')) for _ in range(100)]
        time.sleep(0.2)
        started_s = time.monotonic()
        impatient = httpx.post(f"{url}/v1/score", json=GOOD, headers={"x-request-timeout-seconds": "0.3"}, timeout=30)
        assert (impatient.status_code, time.monotonic() - started_s < 1) == (408, True)  # it waited for a place in vain
        assert_well(url, expected)
        assert time.monotonic() - started_s < 8
        assert {one.recv(100)[:12] for one in stalled} == {b"HTTP/1.1 408"}


@pytest.mark.ray
def test_a_body_that_is_announced_as_too_large_is_refused_before_it_comes(url: str) -> None:
    with half_sent(url, 10**9, b"{") as connection:
        started_s = time.monotonic()
        assert connection.recv(100)[:12] == b"HTTP/1.1 413"
        assert time.monotonic() - started_s < 1


@pytest.mark.ray
def test_many_names_of_features_in_a_small_body_do_not_become_many_columns(url: str) -> None:
    before = peak_bytes(url)
    names = iter(range(10**9))
    few_bytes = [{"id": "a", "features": {f"{next(names):x}": 1 for _ in range(5)}} for _ in range(900)]
    answer = httpx.post(f"{url}/v1/score", json={**GOOD, "candidates": few_bytes}, timeout=30)
    assert answer.status_code == 422, answer.text
    assert peak_bytes(url) - before < MOST_GROWTH_BYTES
    assert len(pa.py_buffer(answer.content)) < 200
