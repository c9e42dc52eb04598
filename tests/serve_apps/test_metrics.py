"""Telling Prometheus takes no long turn of the event loop."""

from typing import Any

from serve_apps.holdings import Holdings
from serve_apps.metrics import Replica, ReplicaMetrics

NUM_REFUSED = 10_000
NOTHING = Holdings({}, {}, 0, 0, {}, {}, {"host": {"events": 0}})


class Told:
    """A histogram that counts what it is told."""

    def __init__(self) -> None:
        self.num = 0

    def observe(self, *_: Any, **__: Any) -> None:
        self.num += 1


def test_calls_that_are_refused_while_nothing_is_scored_are_not_told_all_at_once() -> None:
    """Fifty thousand in ten seconds would stop the event loop for a third of a second."""
    metrics, told = ReplicaMetrics(), Told()
    metrics._latency = told  # type: ignore[assignment]
    for _ in range(NUM_REFUSED):
        before = told.num
        metrics.record("no room", 0.1, 503)
        assert told.num <= before + 1
    metrics.export(Replica(NOTHING, "v1", False, {}, {}, 0, 0.0))
    assert told.num == NUM_REFUSED
    assert told.num - before <= 200
