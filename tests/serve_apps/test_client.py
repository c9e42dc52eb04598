"""The client against a running service, and against one that is full at first."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
import requests

from longer.client import ScoringClient
from longer.errors import UserError
from tests.serve_apps.services import running
from tests.serving.tables import DAY_MS, START_MS, build_world

END_MS = START_MS + 31 * DAY_MS
EVENT = {"item_id": "item2", "event_ts": END_MS, "action": "buy", "features": {"quantity": 1}}


@pytest.mark.ray
def test_the_client_does_all_that_the_service_does(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(build_world(tmp_path_factory.mktemp("client")), num_replicas=2, max_replicas=2) as url:
        client = ScoringClient(url, timeout_s=30)
        about = {"request_ts": END_MS + 1, "events": [EVENT]}
        by_json = client.score(5, ["item1", {"id": "item5", "features": {"price": 2.5}}], **about)
        table = client.score_table(5, pa.table({"id": ["item1", "item5"], "price": [None, 2.5]}), **about)
        assert by_json["user_state"]["num_events"] == 26
        np.testing.assert_allclose(table["label"].to_numpy(), by_json["scores"]["label"], atol=1e-5)
        assert b'"source": "hit"' in table.schema.metadata[b"answer"]
        assert client.add_events(5, [EVENT]) == {"received": 1, "new": 0}
        one, wrong = client.score_batch(
            [{"user_id": 5, "candidates": ["item1"]}, {"user_id": "x", "candidates": ["a"]}]
        )
        assert (len(one["scores"]["label"]), wrong["status"]) == (1, 422)
        assert client.forget(5)["held"] > 0
        assert client.forget(5) == {"replicas": 2, "held": 0}
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


class Silent(FullAtFirst):
    """Takes a call and does not answer in time."""

    num_calls: ClassVar[int] = 0

    def do_POST(self) -> None:
        type(self).num_calls += 1
        time.sleep(0.5)


def test_a_call_that_takes_too_long_is_not_asked_again() -> None:
    """The service may be at it still: asked three times, an overloaded one would have three times the load."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(requests.ReadTimeout):
            ScoringClient(f"http://127.0.0.1:{server.server_port}", timeout_s=0.1).score(1, [1])
    finally:
        server.shutdown()
        server.server_close()
    assert Silent.num_calls == 1
