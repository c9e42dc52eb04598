"""One user is found by a few ranged reads, on S3 too, and is the same as in a scan."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from longer.arrays import NO_EVENT_TS, Histories
from longer.data.sequences import KeepRule
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.schema import EventSchema
from longer.storage import Table, Version
from tests.data.logs import BASKETS, STRINGS, generated_log, log, naive_sequences
from tests.data.tables import publish_sequences
from tests.data.test_requests import as_rows
from tests.s3.proxy import Proxy

RULE, NUM_BUCKETS = KeepRule(20, 8), 4


def publish(path: str, events: pa.Table, schema: EventSchema, row_group_events: int = 20) -> Version:
    return publish_sequences(path, events, schema, RULE, NUM_BUCKETS, row_group_events)


def check_user(histories: Histories, place: int, expected: dict) -> None:
    events = slice(histories.offsets_B1[place], histories.offsets_B1[place + 1])
    times = [round(time.timestamp() * 1000) for time in expected["event_ts"]]
    assert histories.event_ts_E[events].tolist() == times
    assert histories.features["quantity"][events].tolist() == expected["quantity"]
    assert histories.first_index_B[place] == expected["first_index"]
    before = expected["prev_event_ts"]
    assert histories.prev_event_ts_B[place] == (round(before.timestamp() * 1000) if before else NO_EVENT_TS)


@pytest.mark.parametrize("schema", [BASKETS, STRINGS], ids=["int ids", "string ids"])
def test_a_point_read_equals_the_users_own_sequence_in_any_order_and_number(
    tmp_path: Path, schema: EventSchema
) -> None:
    events = log(as_rows(generated_log(num_users=40, num_days=15, seed=0)), schema)
    publish(f"{tmp_path}/sequences", events, schema)
    expected = {row["user_id"]: row for row in naive_sequences(events, schema, RULE.keep_events, RULE.stride_events)}
    table = SequenceTable(f"{tmp_path}/sequences", schema)
    wanted = [*list(expected)[::-3], next(iter(expected))]
    histories = table.get([*wanted, wanted[0]])
    for place, user in enumerate([*wanted, wanted[0]]):
        check_user(histories, place, expected[user])
    by_bucket = {}
    for bucket in range(table.num_buckets):
        users, rows = table.read_bucket(bucket)
        assert users.to_pylist() == sorted(users.to_pylist())
        by_bucket.update({user: (rows, place) for place, user in enumerate(users.to_pylist())})
    assert set(by_bucket) == set(expected)
    for user, (rows, place) in by_bucket.items():
        check_user(rows, place, expected[user])


def test_an_unknown_user_has_an_empty_history_with_the_users_key(tmp_path: Path) -> None:
    publish(f"{tmp_path}/sequences", log([(1, 0, 1, 1)]), BASKETS)
    table = SequenceTable(f"{tmp_path}/sequences", BASKETS)
    histories = table.get([77, 1, 78])
    assert np.diff(histories.offsets_B1).tolist() == [0, 1, 0]
    assert histories.prev_event_ts_B.tolist() == [NO_EVENT_TS] * 3
    assert histories.user_key_B[0] == table.get([77]).user_key_B[0] > 0
    assert len(table.get([])) == 0


def test_a_point_read_touches_only_the_row_groups_that_can_hold_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(f"{tmp_path}/sequences", generated_log(num_users=60, num_days=5, seed=1), BASKETS, row_group_events=20)
    read: list[int] = []
    real = pq.ParquetFile.read_row_group

    def recorded(self: pq.ParquetFile, group: int, *args: object, **kwargs: object) -> pa.Table:
        read.append(group)
        return real(self, group, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
    SequenceTable(f"{tmp_path}/sequences", BASKETS).get([30])
    assert len(read) == 1


def test_missing_values_become_key_0_and_number_0(tmp_path: Path) -> None:
    events = log([(1, 0, 4, 1), (1, 1, 5, 2)])
    holes = events.set_column(events.column_names.index("quantity"), "quantity", pa.array([None, np.nan], pa.float32()))
    publish(f"{tmp_path}/sequences", holes, BASKETS)
    histories = SequenceTable(f"{tmp_path}/sequences", BASKETS).get([1])
    assert histories.features["quantity"].tolist() == [0.0, 0.0]
    assert (histories.features["category"] == 0).tolist() == [True, False]


def test_another_schema_and_an_unknown_version_are_one_line_each(tmp_path: Path) -> None:
    publish(f"{tmp_path}/sequences", log([(1, 0, 1, 1)]), BASKETS)
    with pytest.raises(UserError, match="another event_schema"):
        SequenceTable(f"{tmp_path}/sequences", STRINGS)
    with pytest.raises(UserError, match="version v9 is not in this table"):
        SequenceTable(f"{tmp_path}/sequences", BASKETS, version_id="v9")


def test_s3_over_http_publishes_and_serves_point_reads(s3: str) -> None:
    events = generated_log(num_users=30, num_days=10, seed=2)
    version = publish(f"{s3}/run/sequences", events, BASKETS)
    reopened = Table(f"{s3}/run/sequences").current()
    assert reopened is not None
    assert (reopened.manifest, reopened.files()) == (version.manifest, version.files())
    read_back = Table(f"{s3}/run/sequences").publish("v1", {}).manifest["files"]
    assert read_back == version.manifest["files"]
    Table(f"{s3}/run/sequences").discard("v1")
    publish(f"{s3}/run/sequences", events, BASKETS)
    expected = naive_sequences(events, BASKETS, RULE.keep_events, RULE.stride_events)
    histories = SequenceTable(f"{s3}/run/sequences", BASKETS).get([expected[4]["user_id"], 10**9])
    check_user(histories, 0, expected[4])
    assert np.diff(histories.offsets_B1)[1] == 0
    path = version.files()[0].removeprefix("s3://")
    assert pc.all(pc.is_valid(pq.read_table(path, filesystem=_arrow(s3))["user_id"])).as_py()


def test_a_point_read_over_s3_is_one_ranged_read_of_its_row_group(faulty_s3: Proxy) -> None:
    """Of a user whose bucket's footer has been read; nothing else is asked, and no bytes that lie around the row group."""
    publish("s3://tables/sequences", generated_log(num_users=120, num_days=10, seed=2), BASKETS, row_group_events=100)
    table = SequenceTable("s3://tables/sequences", BASKETS)
    users = list(range(1, 121))
    together = table.get(users)
    for place, user in enumerate(users):
        faulty_s3.requests.clear()
        alone = table.get([user])
        assert alone.event_ts_E.tolist() == together.slice_events(*one_row(together, place)).event_ts_E.tolist()
        assert [request.method for request in faulty_s3.requests] == ["GET"]
        first, last = (faulty_s3.requests[0].byte_range or "").removeprefix("bytes=").split("-")
        assert int(last) - int(first) < 5000


def test_users_of_neighbouring_row_groups_are_one_request_over_s3(faulty_s3: Proxy) -> None:
    """Though their row groups are decoded one by one."""
    publish("s3://tables/sequences", generated_log(num_users=120, num_days=10, seed=2), BASKETS, row_group_events=20)
    table = SequenceTable("s3://tables/sequences", BASKETS)
    for bucket in range(NUM_BUCKETS):
        users, histories = table.read_bucket(bucket)
        table.get(users)  # reads the footer
        faulty_s3.requests.clear()
        assert_same(table.get(users), histories)
        assert [request.method for request in faulty_s3.requests] == ["GET"]


def assert_same(one: Histories, other: Histories) -> None:
    assert all(np.array_equal(value, vars(other)[name]) for name, value in vars(one).items() if name != "features")
    assert all(np.array_equal(values, other.features[name]) for name, values in one.features.items())


def one_row(histories: Histories, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = np.array([row])
    return rows, histories.first_index_B[rows], histories.end_index_B[rows]


def _arrow(path: str) -> pa.fs.FileSystem:
    from longer.files import arrow_filesystem

    return arrow_filesystem(path)[0]
