"""The load generator sends what it says, and a service that falls behind is seen to in the open loop."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from benchmarks.serving_arms.arms import Arm, best_of, extra_ms, throughput_ratio, told_ratio
from benchmarks.serving_arms.load import Load, Place, Sample

SERVICE_S = 0.05


class OneAtATime(BaseHTTPRequestHandler):
    """Takes its time for each request, and others wait; every fourth session is refused."""

    seen: ClassVar[Counter[str]] = Counter()

    def do_POST(self) -> None:
        time.sleep(SERVICE_S)
        session = self.headers["x-session-id"]
        self.seen[session] += 1
        self.rfile.read(int(self.headers["content-length"]))
        content = b'{"user_state": {"source": "hit"}}'
        self.send_response(503 if int(session) % 4 == 3 else 200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    OneAtATime.seen.clear()
    server = HTTPServer(("127.0.0.1", 0), OneAtATime)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_all_that_is_sent_is_accounted_for_and_waiting_counts(url: str) -> None:
    load, place, bodies = Load(2), Place(url), [(str(n), b"{}") for n in range(8)]
    once = load.once(place, bodies, num_clients=2)
    assert OneAtATime.seen == Counter(str(n) for n in range(8))
    assert (len(once.latencies_ms), once.failed, once.sources) == (6, {"503": 2}, {"hit": 6})
    one = load.closed(place, bodies[:1], num_clients=1, seconds=0.5)
    assert SERVICE_S * 1000 <= one.percentile_ms(50) < 3 * SERVICE_S * 1000
    late = load.open(place, bodies[:1], rate=2 / SERVICE_S, seconds=1)  # twice of what it can do
    assert len(late.latencies_ms) == pytest.approx(2 / SERVICE_S, abs=2)
    assert late.percentile_ms(99) > 500


def test_the_best_number_of_clients_is_one_within_the_latency_if_there_is_one() -> None:
    quick, busy = Sample([10.0] * 10, seconds=1), Sample([100.0] * 30, seconds=1)
    assert best_of({1: quick, 8: busy}) == 1
    assert best_of({8: busy, 16: Sample([200.0] * 20, seconds=1)}) == 8


def arm(name: str, *rounds: tuple[float, int]) -> Arm:
    """Of rounds of one and eight clients: one client's milliseconds, and eight clients' requests a second."""
    return Arm(name, [{1: Sample([ms] * 9, seconds=1), 8: Sample([40.0] * rps, seconds=1)} for ms, rps in rounds])


def test_a_ratio_is_of_rounds_that_met_the_same_machine_and_of_the_same_criterion_on_both_sides() -> None:
    """The machine was twice as slow in the second round: of each arm's own median, or best, the ratio would be another."""
    fast, slow = arm("fast", (2.0, 200), (4.0, 100), (2.0, 200)), arm("slow", (3.0, 100), (5.0, 50), (3.0, 100))
    assert throughput_ratio(fast, slow) == 2.0
    assert extra_ms(slow, fast) == 1.0
    late = Arm("late", [{1: Sample([60.0] * 15, seconds=1), 8: Sample([60.0] * 30, seconds=1)}] * 3)
    assert throughput_ratio(fast, late) is None
    assert "late is not within 50 ms at any; at any p99 167 and 30 a second" in told_ratio("x", fast, late)
