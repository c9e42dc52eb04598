"""Rows that cannot be used are told apart, with the reason, and never reach the events table."""

from datetime import UTC, datetime

import pyarrow as pa
import pytest

from longer.data.events import check_rows
from longer.errors import UserError
from longer.schema import EventSchema
from tests.data.logs import BASKETS

NOW = datetime(2020, 1, 1, tzinfo=UTC)


def raw(times: list, **columns: list) -> pa.Table:
    """A log as an importer gives it, of len(times) good rows but for what is given."""
    rows = len(times)
    good = {
        "user_id": [1] * rows,
        "item_id": [2] * rows,
        "basket_id": [3] * rows,
        "action": ["purchase"] * rows,
        "category": ["c"] * rows,
        "quantity": [1] * rows,
    }
    return pa.table({**good, "event_ts": times, **columns})


def test_each_unfit_row_is_quarantined_with_its_first_reason() -> None:
    day = "2019-05-01T10:00:00"
    times = [
        day,
        None,
        "yesterday",
        "1969-12-31T23:59:59",
        "2020-01-01T00:00:01",
        day,
        day,
        day,
        "2019-05-01T10:00:00+02:00",
    ]
    users = [1, 1, 1, 1, 1, None, 1, 1, 1]
    items = [2, 2, 2, 2, 2, None, None, 2, 2]
    baskets = [3, 3, 3, 3, 3, 3, 3, None, 3]
    events, quarantined = check_rows(raw(times, user_id=users, item_id=items, basket_id=baskets), BASKETS, NOW)
    assert quarantined["reason"].to_pylist() == [
        "missing or unparsable event_ts",
        "missing or unparsable event_ts",
        "event_ts before 1970",
        "event_ts in the future",
        "null user_id",
        "null item_id",
        "null basket_id",
    ]
    assert quarantined["event_ts"].to_pylist() == [*times[1:8]]
    assert [time.hour for time in events["event_ts"].to_pylist()] == [10, 8]
    assert events.schema.equals(BASKETS.events_arrow())


def test_a_missing_column_and_one_of_another_type_name_the_column() -> None:
    good = raw(["2019-05-01"])
    with pytest.raises(UserError, match=r"no column 'quantity' .*drop it from event_schema, or .*dataset=generic"):
        check_rows(good.drop_columns(["quantity"]), BASKETS, NOW)
    with pytest.raises(UserError, match=r"column 'item_id' is list<.*>, event_schema says int64"):
        check_rows(raw(["2019-05-01"], item_id=[[1]]), BASKETS, NOW)
    with pytest.raises(UserError, match="column 'event_ts' is bool"):
        check_rows(raw([True]), BASKETS, NOW)


def test_negative_keys_and_values_that_do_not_parse_are_quarantined() -> None:
    days = ["2019-05-01"] * 5
    columns = {
        "user_id": [-1, 1, 1, 1, 1],
        "item_id": ["2", "-2", "two", "2", "2"],
        "quantity": ["1", "1", "1", "many", ""],
    }
    events, quarantined = check_rows(raw(days, **columns), BASKETS, NOW)
    assert quarantined["reason"].to_pylist() == [
        "negative user_id",
        "negative item_id",
        "item_id is not an integer",
        "quantity is not a number",
        "quantity is not a number",
    ]
    assert len(events) == 0
    good, none = check_rows(raw(days, user_id=["1"] * 5, quantity=[None] * 5), BASKETS, NOW)
    assert (len(good), len(none)) == (5, 0)


def test_the_reason_is_the_first_of_more_than_a_byte_can_count() -> None:
    names = [f"f{number}" for number in range(200)]
    schema = EventSchema(features=[{"name": name, "of": "event", "kind": "numeric"} for name in names])
    log = pa.table(
        {"user_id": [1], "item_id": [2], "event_ts": ["2019-05-01"], "action": ["a"], **{n: ["?"] for n in names}}
    )
    _, quarantined = check_rows(log, schema, NOW)
    assert quarantined["reason"].to_pylist() == ["f0 is not a number"]
    last = log.set_column(0, "user_id", [[None]])
    assert check_rows(last, schema, NOW)[1]["reason"].to_pylist() == ["null user_id"]


def test_an_empty_id_is_nobody_and_nothing() -> None:
    schema = EventSchema(user_id="string", item_id="string")
    log = pa.table(
        {"user_id": ["", "u", "u"], "item_id": ["i", "", "i"], "event_ts": ["2019-05-01"] * 3, "action": [""] * 3}
    )
    events, quarantined = check_rows(log, schema, NOW)
    assert quarantined["reason"].to_pylist() == ["empty user_id", "empty item_id"]
    assert len(events) == 1


def test_what_the_reader_could_not_take_apart_keeps_its_own_reason() -> None:
    torn = raw([None, "2019-05-01"], user_id=[None, 1], reason=pa.array(["not 7 fields", None]))
    events, quarantined = check_rows(torn, BASKETS, NOW)
    assert len(events) == 1
    assert quarantined["reason"].to_pylist() == ["not 7 fields"]
