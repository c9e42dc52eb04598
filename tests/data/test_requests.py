"""Requests see only the past, and negatives say nothing but what they should."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longer.data import ray_requests
from longer.data.columns import histories_of
from longer.data.requests import (
    SPLITS,
    SplitTimes,
    draw_negatives,
    find_groups,
    is_cut,
    merge_catalogues,
    partial_catalogue,
    request_rows,
    split_times,
)
from longer.data.sequences import KeepRule
from longer.schema import EventSchema
from longer.storage import checked_output
from longer.windows import WindowRule
from tests.data.logs import BASKETS, DAY_MS, STRINGS, log, logs
from tests.data.tables import sequences_of

SPLIT = SplitTimes(17_006 * DAY_MS, 17_009 * DAY_MS)


def requests(events: pa.Table, schema: EventSchema = BASKETS, seed: int = 0, per_positive: int = 2) -> list[dict]:
    """Rows of the request table of a whole log, in one piece."""
    return build([sequences_of(events, schema)], schema, seed, per_positive)


def build(buckets: list[pa.Table], schema: EventSchema, seed: int = 0, per_positive: int = 2) -> list[dict]:
    catalogue = merge_catalogues([partial_catalogue(bucket, schema, SPLIT) for bucket in buckets], schema)
    rows = []
    for bucket in buckets:
        groups = find_groups(bucket, histories_of(bucket, schema), schema, catalogue)
        negatives = draw_negatives(groups, SPLIT.split_of(groups.request_ts_R), catalogue, per_positive, seed)
        table = request_rows(groups, negatives, bucket["user_id"].combine_chunks(), schema, catalogue)
        assert table.schema.equals(schema.requests_arrow())
        rows += table.to_pylist()
    return rows


@given(logs())
def test_a_request_is_one_basket_with_its_distinct_items_and_the_strictly_earlier_past(events: pa.Table) -> None:
    expected: dict[tuple, set] = {}
    for event in events.to_pylist():
        expected.setdefault((event["user_id"], event["event_ts"], event["basket_id"]), set()).add(event["item_id"])
    rows = requests(events)
    found = [(r["user_id"], r["request_ts"]) for r in rows]
    assert sorted(found) == sorted((user, ts) for user, ts, _ in expected)
    assert found == sorted(found)
    for row in rows:
        positives = {item for item, label in zip(row["item_id"], row["label"], strict=True) if label == 1}
        assert positives == expected[row["user_id"], row["request_ts"], row["user_id"] * 1000 + day_of(row)]
        past = [e for e in events.to_pylist() if e["user_id"] == row["user_id"] and e["event_ts"] < row["request_ts"]]
        assert row["history_end"] == len(past)


def day_of(row: dict) -> int:
    return int(row["request_ts"].timestamp() * 1000) // DAY_MS - 17_000


def test_of_two_baskets_at_one_time_neither_sees_the_other() -> None:
    events = log([(1, 0, 1, 1), (1, 5, 2, 1), (1, 5, 3, 1)])
    two = events.set_column(events.column_names.index("basket_id"), "basket_id", pa.array([7, 8, 9]))
    rows = requests(two)
    assert [row["history_end"] for row in rows] == [0, 1, 1]
    assert len({row["request_id"] for row in rows}) == 3


def test_a_group_spread_over_time_is_one_request_at_its_earliest_time() -> None:
    events = log([(1, 0, 1, 1), (1, 3, 2, 1), (1, 4, 3, 1), (1, 5, 4, 1)])
    spread = events.set_column(events.column_names.index("basket_id"), "basket_id", pa.array([7, 8, 9, 8]))
    rows = requests(spread, per_positive=0)
    assert [(row["history_end"], sorted(row["item_id"])) for row in rows] == [(0, [1]), (1, [2, 4]), (2, [3])]


@given(logs(), st.integers(0, 5), st.integers(1, 4))
def test_negatives_are_distinct_never_positive_and_from_the_same_split(
    events: pa.Table, seed: int, per_positive: int
) -> None:
    of_split: dict[int, set] = {0: set(), 1: set(), 2: set()}
    for event in events.to_pylist():
        of_split[split(event["event_ts"])].add(event["item_id"])
    for row in requests(events, seed=seed, per_positive=per_positive):
        assert len(set(row["item_id"])) == len(row["item_id"])
        negatives = [item for item, label in zip(row["item_id"], row["label"], strict=True) if label == 0]
        assert set(negatives) <= of_split[split(row["request_ts"])]
        assert len(negatives) <= per_positive * sum(row["label"])


def split(time: object) -> int:
    return int(SPLIT.split_of(np.array([time.timestamp() * 1000]))[0])  # type: ignore[attr-defined]


@given(logs(max_users=6), st.sampled_from([BASKETS, STRINGS]))
def test_requests_do_not_depend_on_how_users_are_divided_among_tasks(events: pa.Table, schema: EventSchema) -> None:
    events = log(as_rows(events), schema)
    whole = sequences_of(events, schema)
    alone = [whole.slice(row, 1) for row in range(len(whole))]
    assert build([whole], schema) == build(alone, schema)


def as_rows(events: pa.Table) -> list[tuple[int, int, int, int]]:
    return [
        (e["user_id"], int(e["event_ts"].timestamp() * 1000) // DAY_MS - 17_000, e["item_id"], int(e["quantity"]))
        for e in events.to_pylist()
    ]


def test_another_seed_draws_other_negatives_and_the_same_seed_the_same() -> None:
    events = log([(user, day, user * 7 + day, 1) for user in range(1, 30) for day in range(12)])
    assert requests(events, seed=1) == requests(events, seed=1) != requests(events, seed=2)


def test_the_place_of_a_candidate_says_nothing_of_its_label() -> None:
    events = log([(user, day, (user * 31 + day * 17) % 200, 1) for user in range(1, 200) for day in range(6)])
    places = Counter(row["label"].index(1.0) for row in requests(events, per_positive=4) if len(row["label"]) == 5)
    share = np.array([places[place] for place in range(5)]) / places.total()
    assert places.total() > 1000
    assert np.abs(share - 0.2).max() < 0.05


def test_negatives_are_as_popular_as_events_are() -> None:
    rows = [(user, 0, 1 if user % 10 else 2, 1) for user in range(1, 400)]  # item 1: 9 events of 10
    rows += [(user, 1, 3, 1) for user in range(1, 2000)]
    drawn = Counter(
        item
        for row in requests(log(rows), per_positive=1)
        for item, label in zip(row["item_id"], row["label"], strict=True)
        if label == 0 and 3 in row["item_id"] and row["item_id"][row["label"].index(1.0)] == 3
    )
    assert 0.85 < drawn[1] / drawn.total() < 0.94


def test_candidates_carry_the_features_their_item_had_when_first_seen() -> None:
    events = log([(1, 0, 5, 1), (1, 1, 5, 1), (2, 1, 6, 1)])
    changed = events.set_column(events.column_names.index("category"), "category", pa.array(["first", "later", None]))
    for row in requests(changed):
        assert {dict(zip(row["item_id"], row["category"], strict=True)).get(5, "first")} == {"first"}


def test_a_request_whose_window_the_table_cut_is_found() -> None:
    events = log([(1, day, 1, 1) for day in range(12)])
    rule = KeepRule(4, 4)
    bucket = sequences_of(events, rule=rule)
    catalogue = merge_catalogues([partial_catalogue(bucket, BASKETS, SPLIT)], BASKETS)
    histories = histories_of(bucket, BASKETS)
    groups = find_groups(bucket, histories, BASKETS, catalogue)
    windows = WindowRule(merge_size=2, history_groups=2, query_groups=2, stride_groups=2)
    assert histories.first_index_B.tolist() == [8]
    expected = [windows.history_start(end) * 2 < 8 for end in range(8, 12)]
    assert is_cut(groups.history_end_R, histories.first_index_B[groups.user_row_R], windows).tolist() == expected
    assert True in expected


def test_the_newest_days_are_test_and_those_before_them_validation() -> None:
    times = split_times(17_000 * DAY_MS + 5, 17_099 * DAY_MS + 7, 0.03, 0.10)
    assert times == SplitTimes(17_087 * DAY_MS, 17_090 * DAY_MS)
    assert split_times(0, DAY_MS, 0.03, 0.5) is None
    edges = np.array([times.valid_from_ms - 1, times.valid_from_ms, times.test_from_ms])
    assert [SPLITS[s] for s in times.split_of(edges)] == ["train", "valid", "test"]


def test_a_row_group_holds_few_requests_where_they_have_very_many_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever reads one holds all of their candidates. Only where there are so many is the file another than before."""
    sizes = [3, 40, 2, 5, 1, 0, 11, 2]
    rows = pa.table({"request_id": range(8), "item_id": pa.array([list(range(size)) for size in sizes])})

    def write(most_requests: int, most_candidates: int) -> tuple[bytes, list[int]]:
        monkeypatch.setattr(ray_requests, "_ROW_GROUP_REQUESTS", most_requests)
        monkeypatch.setattr(ray_requests, "_ROW_GROUP_CANDIDATES", most_candidates)
        with checked_output(str(tmp_path), "rows.parquet") as sink:
            ray_requests._write_rows(rows, sink)
        assert pq.read_table(tmp_path / "rows.parquet").equals(rows)
        metadata = pq.read_metadata(tmp_path / "rows.parquet")
        groups = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        return (tmp_path / "rows.parquet").read_bytes(), groups

    assert write(3, 8)[1] == [1, 1, 3, 1, 1, 1]
    content, groups = write(3, 1_000)
    assert groups == [3, 3, 2]
    pq.write_table(rows, tmp_path / "plain.parquet", compression="zstd", row_group_size=3)
    assert content == (tmp_path / "plain.parquet").read_bytes()
