"""The replay of the hit rate's curve: it asks what it says it asks, and counts what it says it counts."""

from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from benchmarks.hit_rate import BATCH, HOST_PARTS, Log, _log, batches, replay
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
    whole, tenth = (replay(log, NUM_REQUESTS, share, tiers) for share in (1.0, 0.1))
    assert (whole["requests"], whole["evicted"]) == (NUM_REQUESTS - counted_from, 0)
    assert {name: round(whole[name] * whole["requests"]) for name in num_first} == num_first
    for row in (whole, tenth):
        assert sum(row[name] for name in ("hit", "append", "load", "cold")) == pytest.approx(1.0)
        assert (row["from_host"] > 0) == (tiers == "device + host")
        assert row["from_host"] <= row["in_store"]
    assert tenth["evicted"] > 0
    assert 0 < tenth["in_store"] < whole["in_store"]
