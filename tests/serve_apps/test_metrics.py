"""Telling Prometheus takes no long turn of the event loop."""

from typing import Any, cast

import pytest

from serve_apps import metrics as metrics_of_replicas
from serve_apps.holdings import Holdings
from serve_apps.metrics import Replica, ReplicaMetrics

NUM_REFUSED = 10_000
NOTHING = Holdings({}, {}, 0, 0, {}, {}, {"host": {"events": 0}})


class Told:
    """A metric that counts what it is told; Ray would export one of its own from here as well."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.num = 0

    def observe(self, *_: Any, **__: Any) -> None:
        self.num += 1

    set = inc = observe


def test_calls_that_are_refused_while_nothing_is_scored_are_not_told_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fifty thousand in ten seconds would stop the event loop for a third of a second."""
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics_of_replicas, kind, Told)
    metrics = ReplicaMetrics()
    told = cast(Told, metrics._latency)
    for _ in range(NUM_REFUSED):
        before = told.num
        metrics.record("no room", 0.1, 503)
        assert told.num <= before + 1
    metrics.export(Replica(NOTHING, "v1", False, {}, {}, 0, 0.0))
    assert told.num == NUM_REFUSED
    assert told.num - before <= 200
