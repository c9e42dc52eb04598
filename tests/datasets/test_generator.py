"""The synthetic log: the same however it is cut, shaped as its settings say, and worth an old history."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import generate_events
from longer.arrays import MS_PER_DAY, MS_PER_HOUR
from longer.config import Settings, load_settings
from longer.datasets import ray_generator
from longer.datasets.generator import chunks, first_event, generate, planted_cluster
from longer.errors import UserError
from longer.schema import EventSchema, Feature
from longer.table_settings import GenerateSettings

SMALL = GenerateSettings(
    num_users=200, num_events=120_000, num_items=5_000, num_clusters=100, num_days=30, period_days=10, episode_days=1
)
SCHEMA = EventSchema(features=(Feature(name="category", kind="categorical", of="item"),))


def whole_log(sizes: GenerateSettings, seed: int = 0, schema: EventSchema = SCHEMA) -> pa.Table:
    parts = [generate(sizes, seed, schema, chunk.day, chunk.first, chunk.end) for chunk in chunks(sizes)]
    return pa.concat_tables(parts).cast(schema.events_arrow())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 29), st.lists(st.integers(0, 4_000), max_size=6), st.integers(0, 2**31 - 1))
def test_a_day_is_the_same_however_it_is_cut(day: int, cuts: list[int], seed: int) -> None:
    first, end = first_event(SMALL, day), first_event(SMALL, day + 1)
    bounds = sorted({first, end, *(first + cut for cut in cuts if first + cut < end)})
    pieces = [generate(SMALL, seed, SCHEMA, day, *bound) for bound in pairwise(bounds)]
    assert pa.concat_tables(pieces).combine_chunks().equals(generate(SMALL, seed, SCHEMA, day, first, end))


@given(st.integers(1, 50), st.integers(0, 1_000), st.integers(1, 100))
def test_files_hold_every_event_once_and_none_is_too_large(num_days: int, more: int, events_per_file: int) -> None:
    sizes = SMALL.model_copy(
        update={"num_days": num_days, "num_events": num_days + more, "events_per_file": events_per_file}
    )
    files = chunks(sizes)
    assert [n for file in files for n in range(file.first, file.end)] == list(range(sizes.num_events))
    assert {file.day for file in files} == set(range(num_days))
    assert all(0 < file.end - file.first <= events_per_file for file in files)


def test_another_seed_is_another_log_of_the_same_shape() -> None:
    logs = [whole_log(SMALL, seed)["user_id"].to_numpy() for seed in (0, 1)]
    assert np.mean(logs[0] == logs[1]) < 0.05
    counts = [np.bincount(users, minlength=201)[1:] for users in logs]
    assert np.corrcoef(counts)[0, 1] > 0.99


def test_users_and_items_follow_their_zipf_laws() -> None:
    events = whole_log(SMALL.model_copy(update={"long_range_share": 0.0}))
    for name, size, exponent in (("user_id", 200, 0.8), ("item_id", 5_000, 1.0)):
        ids = events[name].to_numpy()
        assert ids.min() == 1
        assert ids.max() <= size
        counts = np.bincount(ids, minlength=size + 1)[1:]
        head = np.arange(4, 60)  # past the first ranks, where the law and its integral differ
        slope = np.polyfit(np.log(head + 1.5), np.log(counts[head]), 1)[0]
        assert slope == pytest.approx(-exponent, abs=0.08)
    flat = np.bincount(whole_log(SMALL.model_copy(update={"user_zipf_exponent": 0.0}))["user_id"].to_numpy())[1:]
    assert flat.max() < 1.5 * flat.min()


@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.0, 1.0 - 2e-16, 1.0 + 1e-12, 1.0 + 2e-6, 1.5])
def test_each_user_has_the_share_that_the_density_has_over_its_rank(exponent: float) -> None:
    users = whole_log(SMALL.model_copy(update={"user_zipf_exponent": exponent}))["user_id"].to_numpy()
    edge = np.arange(1, 202) ** (1 - exponent) if abs(exponent - 1) > 1e-6 else np.log(np.arange(1, 202))
    share = np.diff(edge) / (edge[-1] - edge[0])
    counts = np.bincount(users, minlength=201)[1:]
    assert np.all(np.abs(counts - share * len(users)) < 5 * np.sqrt(share * len(users)) + 1)


def test_files_are_in_the_order_of_arrival_not_of_time_and_evenings_are_busier_than_nights() -> None:
    times = np.concatenate(
        [
            generate(SMALL, 0, SCHEMA, c.day, c.first, c.end)["event_ts"].cast(pa.int64()).to_numpy()
            for c in chunks(SMALL)
        ]
    )
    assert (np.diff(times) < 0).mean() > 0.2
    assert (np.maximum.accumulate(times) - times).max() <= SMALL.max_delay_s * 1000
    hours = np.bincount(times % MS_PER_DAY // MS_PER_HOUR, minlength=24)
    assert hours[18:22].min() > 5 * hours[1:5].max()
    in_order = SMALL.model_copy(update={"max_delay_s": 0})
    assert np.all(np.diff(whole_log(in_order)["event_ts"].cast(pa.int64()).to_numpy()) >= 0)


def test_the_next_cluster_is_known_from_one_period_back_and_not_from_recent_events() -> None:
    """Over the first long-range event of each user and episode of the last period, which is what the log is planted for."""
    sizes = SMALL
    number = np.arange(sizes.num_events)
    day = np.repeat(np.arange(30), [first_event(sizes, d + 1) - first_event(sizes, d) for d in range(30)])
    events = whole_log(sizes)
    user, cluster = events["user_id"].to_numpy() - 1, (events["item_id"].to_numpy() - 1) % sizes.num_clusters
    planted = np.array([planted_cluster(sizes, 0, d, np.arange(200)) for d in range(30)])[day, user]
    follows = cluster == planted
    assert follows.mean() == pytest.approx(0.3 + 0.7 / sizes.num_clusters, abs=0.01)

    asked = {}
    for n in number[follows & (day >= 20)]:
        asked.setdefault((user[n], day[n]), n)
    hits = {"a period back": 0, "recent": 0, "popular": 0}
    popular = np.bincount(cluster).argmax()
    of_user = [np.flatnonzero(user == u) for u in range(200)]
    for (u, d), n in asked.items():
        mine = of_user[u]
        back = cluster[mine[day[mine] == d - 10]]
        recent = cluster[mine[(mine < n) & (day[mine] >= d - 9)]]
        hits["a period back"] += len(back) > 0 and np.bincount(back).argmax() == cluster[n]
        hits["recent"] += len(recent) > 0 and np.bincount(recent).argmax() == cluster[n]
        hits["popular"] += popular == cluster[n]
    share = {name: count / len(asked) for name, count in hits.items()}
    assert len(asked) > 1_500
    assert share["a period back"] > 0.7
    assert share["recent"] < 0.05
    assert share["popular"] < 0.05


def settings_of(root: Path, **sizes: object) -> Settings:
    generated = {**SMALL.model_dump(), "num_events": 30_000, **sizes}
    return load_settings(
        overrides={"root": str(root), "event_schema": SCHEMA.model_dump(), "generate": generated, "seed": 7}
    )


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_job_writes_the_same_bytes_as_one_process_and_a_rerun_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = settings_of(tmp_path / "whole")
    version = generate_events.run(whole)
    writer = ray_generator.ChunkWriter(whole.generate, 7, SCHEMA, str(tmp_path / "alone"))
    alone = {r["path"]: r["sha256"] for r in (writer(vars(chunk)) for chunk in reversed(chunks(whole.generate)))}
    assert {file.path: file.sha256 for file in version.data_files()} == alone
    events = pa.concat_tables(pq.read_table(file, partitioning=None) for file in version.files())
    assert events.schema.equals(SCHEMA.events_arrow())
    assert len(events) == version.manifest["num_rows"] == 30_000
    in_parts = generate_events.run(settings_of(tmp_path / "parts", events_per_file=300))
    assert len(in_parts.files()) == 120
    assert pa.concat_tables(pq.read_table(file, partitioning=None) for file in in_parts.files()).equals(events)
    capsys.readouterr()
    assert generate_events.run(whole).manifest == version.manifest
    assert "already built, nothing changed" in capsys.readouterr().err


def test_what_the_log_cannot_have_is_one_line() -> None:
    for changes in ({"group_id": "basket_id"}, {"features": [{"name": "price", "kind": "numeric", "of": "event"}]}):
        with pytest.raises(UserError, match=r"event_schema: the generated log has no column '(basket_id|price)'"):
            generate_events.run(load_settings(overrides={"event_schema": changes}))
    with pytest.raises(UserError, match="ids of the generated log are int64"):
        generate_events.run(load_settings(overrides={"event_schema": {"user_id": "string"}}))
    for sizes, named in (
        ({"period_days": 9, "episode_days": 2}, "period_days=9 is not a multiple"),
        ({"num_days": 28}, "num_days=28 is no longer than period_days=28"),
        ({"num_items": 10}, "num_items=10 is less than num_clusters"),
        ({"num_events": 10}, "num_events=10 leaves days"),
    ):
        with pytest.raises(UserError, match=f"generate: {named}"):
            load_settings(overrides={"generate": sizes})
