"""The client against a running service, and against one that is full at first."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import requests
import urllib3

from longer.client import ScoringClient
from longer.errors import UserError
from longer.patience import Patience
from tests.serve_apps.services import Front, running
from tests.serving.tables import DAY_MS, START_MS, build_world

END_MS = START_MS + 31 * DAY_MS
EVENT = {"item_id": "item2", "event_ts": END_MS, "action": "buy", "features": {"quantity": 1}}


@pytest.mark.ray
def test_the_client_does_all_that_the_service_does(front: Front, tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(front, build_world(tmp_path_factory.mktemp("client")), num_replicas=2, max_replicas=2) as url:
        client = ScoringClient(url, timeout_s=30)
        about = {"request_ts": END_MS + 1, "events": [EVENT]}
        by_json = client.score(5, ["item1", {"id": "item5", "features": {"price": 2.5}}], **about)
        table = client.score_table(5, pa.table({"id": ["item1", "item5"], "price": [None, 2.5]}), **about)
        assert by_json["user_state"]["num_events"] == 26
        np.testing.assert_allclose(table["label"].to_numpy(), by_json["scores"]["label"], atol=1e-5)
        assert b'"source": "hit"' in table.schema.metadata[b"answer"]
        told = client.add_events(5, [EVENT])
        assert (told["received"], told["new"]) == (1, 0)
        one, wrong = client.score_batch(
            [{"user_id": 5, "candidates": ["item1"]}, {"user_id": "x", "candidates": ["a"]}]
        )
        assert (len(one["scores"]["label"]), wrong["status"]) == (1, 422)
        assert client.forget(5)["held"] > 0
        assert client.forget(5) == {"replicas": 2, "held": 0}
        with pytest.raises(UserError, match="user_id: expected int64"):
            client.forget("..")
        with pytest.raises(UserError, match=r"candidates: expected string values \(422\)"):
            client.score(5, [1])


class FullAtFirst(BaseHTTPRequestHandler):
    """503 twice, then an answer that repeats the headers."""

    num_calls: ClassVar[int] = 0

    def do_POST(self) -> None:
        type(self).num_calls += 1
        is_full = self.num_calls < 3
        content = b'{"error": "full"}' if is_full else b'{"session": "%s"}' % self.headers["x-session-id"].encode()
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(503 if is_full else 200)
        self.send_header("retry-after", "0")
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def full_at_first() -> Iterator[str]:
    FullAtFirst.num_calls = 0
    server = HTTPServer(("127.0.0.1", 0), FullAtFirst)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_full_service_is_asked_again_and_not_for_ever(full_at_first: str) -> None:
    assert ScoringClient(full_at_first).score("Zoë/1", [1]) == {"session": "Zo%C3%AB%2F1"}
    FullAtFirst.num_calls = 0
    with pytest.raises(UserError, match=r"full \(503\)"):
        ScoringClient(full_at_first, max_retries=1).score(1, [1])
    with pytest.raises(requests.ConnectionError):
        ScoringClient("http://127.0.0.1:9", max_retries=0).score(1, [1])


class PartlyUnreadable(BaseHTTPRequestHandler):
    """Users whose number is not below that of the calls are refused for the moment; after `num_answered` calls, all are."""

    asked: ClassVar[list[list[int]]] = []
    num_answered: ClassVar[int]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        users = [one["user_id"] for one in body["requests"]]
        self.asked.append(users)
        refused = {"error": "later", "status": 503}
        results = [{"scores": user} if user < len(self.asked) else refused for user in users]
        content = json.dumps({"results": results}).encode()
        self.send_response(200 if len(self.asked) <= self.num_answered else 500)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("num_answered", "max_retries", "asked", "num_refused"),
    [
        (9, 3, [[0, 2, 1, 0], [2, 1], [2]], 0),
        (9, 1, [[0, 2, 1, 0], [2, 1]], 1),
        (1, 1, [[0, 2, 1, 0], [2, 1]], 2),
    ],
)
def test_of_several_users_those_refused_for_the_moment_are_asked_again_and_nobody_else(
    num_answered: int, max_retries: int, asked: list[list[int]], num_refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As single calls are; what has been answered is not lost for those who are not."""
    monkeypatch.setattr("longer.patience.time.sleep", lambda _: None)
    PartlyUnreadable.asked, PartlyUnreadable.num_answered = [], num_answered
    with serving(PartlyUnreadable) as url:
        client = ScoringClient(url, timeout_s=30, max_retries=max_retries, direct=False)
        results = client.score_batch([{"user_id": user, "candidates": [1]} for user in asked[0]])
    assert PartlyUnreadable.asked == asked
    told = [None if "error" in result else result["scores"] for result in results]
    assert told.count(None) == num_refused
    assert all(said in (None, user) for said, user in zip(told, asked[0], strict=True))


class Broken(FullAtFirst):
    """An error of the service's own."""

    def do_POST(self) -> None:
        content = b'{"error": "internal error: see the replica\'s log"}'
        self.send_response(500)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def test_an_error_of_the_service_is_no_mistake_of_its_caller() -> None:
    with serving(Broken) as url, pytest.raises(requests.HTTPError, match="500 "):
        ScoringClient(url).score(1, [1])


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Elsewhere(FullAtFirst):
    """What the service's framework says of a path that it does not have."""

    def do_POST(self) -> None:
        self.send_response(404)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", "22")
        self.end_headers()
        self.wfile.write(b'{"detail":"Not Found"}')


@pytest.mark.parametrize("url", ["127.0.0.1:8321", "localhost:8321", "grpc://localhost:8321", "//localhost", ""])
def test_an_address_that_is_no_url_is_refused_at_once_with_what_a_url_begins_with(url: str) -> None:
    with pytest.raises(UserError, match=f"^{url}: a URL begins with http:// or https://"):
        ScoringClient(url)
    ScoringClient("HTTPS://localhost:8321")


def test_a_wrong_url_is_told_as_what_was_not_found_there() -> None:
    with serving(Elsewhere) as url, pytest.raises(requests.HTTPError, match=f"404 .*{url}/v1/v1/score"):
        ScoringClient(f"{url}/v1").score(1, [1])


class Unreadable(FullAtFirst):
    """An error as JSON that is no object, or of which the end is missing."""

    content: ClassVar[bytes]

    def do_POST(self) -> None:
        self.send_response(404)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)


@pytest.mark.parametrize("content", [b'{"error": "no', b"404", b'["error"]', b"null", b"\xff"])
def test_an_error_that_cannot_be_read_is_an_error_of_http(content: bytes) -> None:
    Unreadable.content = content
    with serving(Unreadable) as url, pytest.raises(requests.HTTPError, match="404"):
        ScoringClient(url).score(1, [1])


class Silent(FullAtFirst):
    """Takes a call and does not answer in time."""

    num_calls: ClassVar[int] = 0

    def do_POST(self) -> None:
        type(self).num_calls += 1
        time.sleep(0.5)


def test_a_call_that_takes_too_long_is_not_asked_again() -> None:
    """The service may be at it still: asked three times, an overloaded one would have three times the load."""
    with serving(Silent) as url, pytest.raises(requests.ReadTimeout):
        ScoringClient(url, timeout_s=0.1).score(1, [1])
    assert Silent.num_calls == 1


class Trickling(FullAtFirst):
    """Says what it was told, then sends its answer byte by byte."""

    told: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.told.append(self.headers.get("authorization", ""))
        self.send_response(200)
        self.send_header("content-length", "1000")
        self.end_headers()
        with suppress(ConnectionError):
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)


def test_the_time_is_for_the_whole_call_and_netrc_does_not_replace_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read is answered in time, and still nobody waits longer than was said."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serving(Trickling) as url:
        started_s = time.monotonic()
        with pytest.raises(requests.ReadTimeout):
            ScoringClient(url, token="mine", timeout_s=0.3).score(1, [1])
        assert time.monotonic() - started_s < 0.6
    assert Trickling.told == ["Bearer mine"]


def test_what_connecting_takes_is_taken_off_the_time_for_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = urllib3.util.connection.create_connection

    def slow(*args: Any, **kwargs: Any) -> socket.socket:
        time.sleep(0.5)
        return connect(*args, **kwargs)

    monkeypatch.setattr(urllib3.util.connection, "create_connection", slow)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = ScoringClient(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.8, direct=False)
        started_s = time.monotonic()
        with pytest.raises(requests.ReadTimeout):
            client.score(1, [1])
        assert time.monotonic() - started_s < 1.2  # not 0.5 more than it may take


class Paths(FullAtFirst):
    """Repeats the path that it was asked for."""

    def do_DELETE(self) -> None:
        content = json.dumps({"path": self.path}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def test_a_user_of_dots_and_slashes_is_forgotten_and_not_a_path_followed() -> None:
    with serving(Paths) as url:
        for user, path in (("..", "%2E%2E"), (".", "%2E"), ("a/../b?", "a%2F%2E%2E%2Fb%3F"), ("ä", "%C3%A4"), (5, "5")):
            assert ScoringClient(url).forget(user) == {"path": f"/v1/users/{path}"}


class Full(FullAtFirst):
    """503 always; keeps when it was asked, and how long it was given."""

    calls: ClassVar[list[tuple[float, int]]] = []

    def do_POST(self) -> None:
        self.calls.append((time.monotonic(), int(self.headers["x-timeout-ms"])))
        assert float(self.headers["x-request-timeout-seconds"]) == pytest.approx(self.calls[-1][1] / 1000, abs=0.002)
        self.send_response(503)
        self.send_header("content-length", "0")
        self.end_headers()


def test_pauses_grow_are_not_all_alike_and_what_is_left_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Full) as url:
        for _ in range(2):
            with pytest.raises(requests.HTTPError):
                ScoringClient(url, timeout_s=5).score(1, [1])
    first, second = Full.calls[:3], Full.calls[3:]
    for calls in (first, second):
        pauses_s = [after[0] - before[0] for before, after in pairwise(calls)]
        assert pauses_s[0] >= 0.1
        assert pauses_s[1] >= 0.2
        assert sum(pauses_s) < 1.5  # of 0.45, on a machine with time for it
        assert [given_ms for _, given_ms in calls] == sorted((given_ms for _, given_ms in calls), reverse=True)
        assert calls[0][1] - calls[-1][1] >= 300
    assert first[1][0] - first[0][0] != pytest.approx(second[1][0] - second[0][0], abs=1e-4)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("slept for longer than there is time"))
    assert not Patience(timeout_s=0.5, max_retries=3).pauses(0.5)
