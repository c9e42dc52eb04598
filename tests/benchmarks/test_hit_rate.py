"""The replay of the hit rate's curve: it asks what it says it asks, and counts what it says it counts."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from benchmarks import hit_rate
from benchmarks.hit_rate import BATCH, HOST_PARTS, NO_CACHE, Log, _log, batches, replay
from longer.datasets import generator
from longer.model_settings import ModelSettings
from longer.table_settings import GenerateSettings
from tests.model.generate import SCHEMA, SIZES

NUM_REQUESTS = 200


@cache
def tiny_log() -> Log:
    """Of users with several events at one time, many of whom are asked about seldom."""
    asked = GenerateSettings(num_users=150, num_events=1_500, num_items=50, num_clusters=5)
    schema = SCHEMA.model_copy(update={"features": SCHEMA.features[:1], "tasks": ("click",)})
    parts = [generator.generate(asked, 0, schema, c.day, c.first, c.end) for c in generator.chunks(asked)]
    events = pa.concat_tables(parts).cast(schema.events_arrow())
    at = events.schema.get_field_index("event_ts")
    events = events.set_column(at, events.schema.field(at), pc.floor_temporal(events["event_ts"], unit="day"))
    return _log("tiny", events, schema, ModelSettings(**SIZES), one_user_in=1, every=3)


def test_a_request_knows_no_event_of_its_own_time_or_later() -> None:
    log = tiny_log()
    assert len(log.row_R) > NUM_REQUESTS
    assert (np.diff(log.ts_R) >= 0).all()
    for row, end, ts in zip(log.row_R, log.end_R, log.ts_R, strict=True):
        begin, until = log.histories.offsets_B1[row : row + 2]
        assert np.searchsorted(log.histories.event_ts_E[begin:until], ts) == end


def test_a_batch_has_each_user_once_and_no_request_overtakes_another() -> None:
    row_R = np.random.default_rng(0).integers(0, 40, 500)
    found = list(batches(row_R))
    assert np.concatenate([row_R[batch] for batch in found]).tolist() == row_R.tolist()
    assert all(0 < len(set(row_R[batch])) == batch.stop - batch.start <= BATCH for batch in found)


@pytest.mark.parametrize("tiers", HOST_PARTS)
def test_shares_are_of_what_happened_in_the_counted_half(tiers: str) -> None:
    """With room for all, only a user's first request finds no state; with less, some go, and the shares still are of all."""
    log = tiny_log()
    last = slice(len(log.row_R) - NUM_REQUESTS, len(log.row_R))
    row_R, end_R = log.row_R[last], log.end_R[last]
    counted_from = next(batch.start for batch in batches(row_R) if batch.start >= NUM_REQUESTS // 2)
    is_first_R = np.isin(np.arange(NUM_REQUESTS), np.unique(row_R, return_index=True)[1])
    num_first = {
        "load": (is_first_R & (end_R > 0))[counted_from:].sum(),
        "cold": (is_first_R & (end_R == 0))[counted_from:].sum(),
    }
    assert num_first["load"] > 0
    without, whole, tenth = replay(log, NUM_REQUESTS, [NO_CACHE, (tiers, 1.0), (tiers, 0.1)])
    assert (whole["requests"], whole["evicted"]) == (NUM_REQUESTS - counted_from, 0)
    assert {name: round(whole[name] * whole["requests"]) for name in num_first} == num_first
    for row in (without, whole, tenth):
        assert sum(row[name] for name in ("hit", "append", "load", "cold")) == pytest.approx(1.0)
    for row in (whole, tenth):
        assert (row["from_host"] > 0) == (tiers == "device + host")
        assert row["from_host"] <= row["in_store"]
    assert tenth["evicted"] > 0
    assert without["in_store"] == 0 < tenth["in_store"] < whole["in_store"]


def test_throughput_against_no_cache_is_of_the_rows_own_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which each append takes one second and each encode three, though the machine slows down all the time."""
    log, clock = tiny_log(), Clock()
    monkeypatch.setattr(hit_rate, "time", clock)
    for name, seconds in (("append", 1), ("encode", 3)):
        monkeypatch.setattr(hit_rate, name, clock.costing(seconds, getattr(hit_rate, name)))
    without, whole = replay(log, NUM_REQUESTS, [NO_CACHE, ("device", 1.0)])
    assert without["against_no_cache"] == 1
    appended = whole["append"]
    expected = 3 / (appended + 3 * (1 - appended))
    lowest, highest = whole["against_no_cache_rounds"]
    assert lowest <= whole["against_no_cache"] <= highest
    assert whole["against_no_cache"] == pytest.approx(expected, rel=0.1)
    assert whole["requests_per_s"] > without["requests_per_s"]


class Clock:
    """Goes on by what is asked for, and ever more of it."""

    def __init__(self) -> None:
        self.now_s, self.slowness = 0.0, 1.0

    def process_time(self) -> float:
        return self.now_s

    def costing(self, seconds: float, call: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def slowly(*args: Any) -> list[Any]:
            found = call(*args)
            self.now_s += len(found) * seconds * self.slowness
            self.slowness *= 1.01
            return found

        return slowly
