"""Values of any log become the schema's types or null: no crash, no guess, no silently wrong time."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longer.data.parse import as_times, as_type
from longer.errors import UserError

NOW_MS = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp() * 1000)
NOON_S = 1_556_712_000  # 2019-05-01T12:00:00Z
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def parse_one(value: Any, unit: Any, kind: pa.DataType | None = None) -> tuple[int | None, list[str]]:
    """Milliseconds of one value, and the reasons not to take it."""
    times, misfits = as_times(pa.array([value], kind), unit, NOW_MS)
    return times[0].as_py(), [reason for reason, rows in misfits.items() if rows[0]]


@pytest.mark.parametrize("unit", PER_SECOND)
@pytest.mark.parametrize("stated", PER_SECOND)
def test_a_number_in_another_unit_than_stated_is_told_apart_never_taken(unit: str, stated: str) -> None:
    value = NOON_S * PER_SECOND[unit]
    for given_as in (value, str(value)):
        time_ms, reasons = parse_one(given_as, stated)
        if unit == stated:
            assert (time_ms, reasons) == (NOON_S * 1000, [])
        else:
            assert reasons == [f"event_ts fits {unit}, not {stated}"]


def test_a_day_written_as_a_number_is_not_a_moment_of_1970() -> None:
    assert parse_one(20190501, "s")[1] == ["event_ts fits YYYYMMDD, not s"]
    assert parse_one("20190501", "ms")[1] == ["event_ts fits YYYYMMDD, not ms"]


@pytest.mark.parametrize("value", [2020, 18_262, 26_297_280, 4_102_444_800, 473_385_600])
def test_a_number_before_1990_counts_something_else_years_days_minutes_or_seconds_of_the_future(value: int) -> None:
    assert parse_one(value, "ms")[1] == ["event_ts before 1990 in ms"]
    assert parse_one(str(value), "ms")[1] == ["event_ts before 1990 in ms"]
    assert parse_one(value, "relative_ms") == (value, [])


@pytest.mark.parametrize("value", [0, 19_900_101, 20_190_501, 20_261_124, 26_000_000, NOON_S])
def test_a_clock_that_starts_at_an_untold_moment_is_taken_as_it_is(value: int) -> None:
    for given_as in (value, str(value), float(value)):
        assert parse_one(given_as, "relative_s") == (value * 1000, [])
        assert parse_one(given_as, "relative_us") == (value // 1000, [])


@pytest.mark.parametrize(
    ("value", "kind", "time_ms"),
    [
        (-1, pa.timestamp("ns"), -1),
        (-1, pa.timestamp("us", "UTC"), -1),
        ("1969-12-31T23:59:59.9999", None, -1),
        (-1, None, -1),
        (-0.25, None, -1),
        (-0.0005, None, -1),
        ("-0.0005", None, -1),
        (1.9999, None, 1999),
        ("1.9999", None, 1999),
        (-1, pa.date32(), -86_400_000),
    ],
)
def test_fractions_of_a_millisecond_are_rounded_down_also_before_1970(
    value: Any, kind: pa.DataType | None, time_ms: int
) -> None:
    unit = "ns" if value == -1 else "ms" if value == -0.25 else "s"
    assert parse_one(value, unit, kind) == (time_ms, [])


def test_hexadecimal_is_no_integer_whatever_stands_beside_it() -> None:
    for beside in ("7", "x"):
        parsed = as_type(pa.array(["0x10", "0X10", beside]), pa.field("item_id", pa.int64()))
        assert parsed.to_pylist()[:2] == [None, None]
        assert as_times(pa.array(["0x10", beside]), "s", NOW_MS)[0][0].as_py() is None


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("2019-05-01T12:00:00", None),
        ("2019-05-01 12:00:00", None),
        ("2019-05-01T14:00:00+02:00", None),
        ("2019-05-01T12:00:00Z", None),
        (" 2019-05-01T12:00:00.000 ", None),
        (NOON_S, pa.timestamp("s")),
        (NOON_S * 1_000_000, pa.timestamp("us", "Asia/Shanghai")),
        (NOON_S * 1_000_000_000, pa.timestamp("ns", "UTC")),
        (NOON_S * 1000.0, None),
        (f"{NOON_S * 1000}.0", None),
    ],
)
def test_every_way_to_write_a_moment_is_the_same_moment(value: Any, kind: pa.DataType | None) -> None:
    assert parse_one(value, "ms", kind) == (NOON_S * 1000, [])


def test_zones_and_plain_text_and_numbers_mixed_in_one_column_are_each_read_by_their_own_rule() -> None:
    column = pa.array(["2019-05-01T14:00:00+02:00", str(NOON_S), "2019-05-01T12:00:00", "soon", None, f"{NOON_S}.25"])
    times, _ = as_times(column, "s", NOW_MS)
    assert times.to_pylist() == [NOON_S * 1000, NOON_S * 1000, NOON_S * 1000, None, None, NOON_S * 1000 + 250]


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.sampled_from(list(PER_SECOND)))
def test_no_number_overflows_into_a_plausible_time(values: list[int], unit: Any) -> None:
    times, _ = as_times(pa.array(values, pa.int64()), unit, NOW_MS)
    for value, time in zip(values, times.to_pylist(), strict=True):
        exact = value * 1000 // PER_SECOND[unit]
        assert time == exact or (abs(exact) > 2**52 and (time > NOW_MS if exact > 0 else time < 0))


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(["1", " 2 ", "3.0", "x", "", None, "1e3", "9223372036854775807", "9223372036854775808"]), None),
        (pa.array([1.0, np.nan, 2.5, 2.0**60]), [1, None, None, None]),
        (pa.array([2**63, 5], pa.uint64()), [None, 5]),
        (pa.array(["7", "8"]).dictionary_encode(), [7, 8]),
        (pa.array(["7", None], pa.large_string()), [7, None]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_what_is_not_an_integer_is_null(column: pa.Array, expected: list | None) -> None:
    parsed = as_type(column, pa.field("item_id", pa.int64()))
    assert parsed.to_pylist() == (expected or [1, 2, 3, None, None, None, None, 2**63 - 1, None])


def test_what_is_not_a_number_is_null() -> None:
    parsed = as_type(pa.array(["1", "-2.5e3", ".5", "many", None]), pa.field("price", pa.float32()))
    assert parsed.to_pylist() == [1, -2500, 0.5, None, None]


def test_an_id_is_the_same_text_whether_a_day_has_it_as_integer_float_or_text() -> None:
    for column in (pa.array([7, None]), pa.array([7.0, None]), pa.array(["7", None])):
        assert as_type(column, pa.field("item_id", pa.string())).to_pylist() == ["7", None]


def test_a_type_that_never_fits_names_the_column() -> None:
    with pytest.raises(UserError, match=r"column 'item_id' is list<.*event_schema says int64"):
        as_type(pa.array([[1]]), pa.field("item_id", pa.int64()))
    with pytest.raises(UserError, match="column 'event_ts' is bool"):
        as_times(pa.array([True]), "ms", NOW_MS)
