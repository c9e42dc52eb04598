"""Keys are part of checkpoints and of every table's buckets: these values must never change."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from longer.hashing import bucket_of, hash_int64, stable_key, stable_keys


def test_golden_keys() -> None:
    assert hash_int64(np.array([0, 1, -1])).tolist() == [
        16294208416658607535,
        10451216379200822465,
        16490336266968443936,
    ]
    assert stable_keys(pa.array([1, 2, 1095275, None])).tolist() == [
        1227844342346046657,
        1682153688901572302,
        1063022626818981603,
        0,
    ]
    assert stable_keys(pa.array(["a", "purchase", "é", "", None])).tolist() == [
        4726978906124959696,
        734392176196662102,
        7685437095904078055,
        0,
        0,
    ]
    assert bucket_of(stable_keys(pa.array([1, 2, 3, 4])), 16).tolist() == [9, 12, 9, 5]


@given(st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=20))
def test_a_key_does_not_depend_on_how_the_column_is_stored(values: list[str | None]) -> None:
    column = pa.array(values, pa.string())
    expected = stable_keys(column).tolist()
    assert stable_keys(column.dictionary_encode()).tolist() == expected
    assert stable_keys(pa.chunked_array([column[:3], column[3:]])).tolist() == expected
    assert [stable_keys(pa.array([value], pa.string()))[0] for value in values] == expected


@given(st.integers(-(2**63), 2**63 - 1))
def test_a_user_is_known_by_one_key_asked_for_alone_or_in_a_column(value: int) -> None:
    assert stable_key(value) == stable_keys(pa.array([value], pa.int64()))[0]
    assert stable_key(str(value)) == stable_keys(pa.array([str(value)]))[0]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50))
def test_only_missing_values_have_key_0(values: list[int]) -> None:
    assert (stable_keys(pa.array(values, pa.int64())) > 0).all()
