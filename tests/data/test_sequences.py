"""Sequences equal their definition, however the log was cut and trimmed."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longer.data.sequences import KeepRule, Older, build_sequences, trim_events
from longer.hashing import stable_keys
from longer.schema import EventSchema
from tests.data.logs import BASKETS, STRINGS, log, logs, naive_sequences


def trimmed(events: pa.Table, schema: EventSchema, rule: KeepRule) -> tuple[pa.Table, Older]:
    rows, older = trim_events(events, stable_keys(events["user_id"]), schema, rule)
    return events if rows is None else events.take(pa.array(rows)), older


def built(events: pa.Table, schema: EventSchema, rule: KeepRule, num_files: int) -> pa.Table:
    """All users' sequences from a log cut into files, each trimmed on its own."""
    rows = -(-len(events) // num_files)
    kept, older = zip(*(trimmed(events.slice(i, rows), schema, rule) for i in range(0, len(events), rows)), strict=True)
    return build_sequences(pa.concat_tables(kept), Older.concatenate(list(older)), schema, rule)


@pytest.mark.parametrize("schema", [BASKETS, STRINGS], ids=["int ids", "string ids"])
@given(data=st.data(), keep=st.integers(1, 12), stride=st.integers(1, 5), num_files=st.integers(1, 4))
def test_trimmed_and_shuffled_pieces_equal_one_users_events_sorted(
    schema: EventSchema, data: st.DataObject, keep: int, stride: int, num_files: int
) -> None:
    events = data.draw(logs(schema))
    table = built(events, schema, KeepRule(keep, stride), num_files)
    assert table.schema.equals(schema.sequences_arrow())
    assert table.to_pylist() == naive_sequences(events, schema, keep, stride)


@given(logs(), st.integers(0, 2**32 - 1))
def test_the_order_of_ties_does_not_depend_on_the_order_of_the_log(events: pa.Table, seed: int) -> None:
    import numpy as np

    shuffled = events.take(pa.array(np.random.default_rng(seed).permutation(len(events))))
    rule = KeepRule(6, 2)
    assert built(events, BASKETS, rule, 1).equals(built(shuffled, BASKETS, rule, 3))


def test_trimming_bounds_what_a_busy_user_sends_through_the_shuffle_and_counts_the_rest() -> None:
    events = log([(1, day, 1, 1) for day in range(100)] + [(2, 0, 1, 1)])
    kept, older = trimmed(events, BASKETS, KeepRule(8, 4))
    assert len(kept) == 8 + 4 + 1
    rows = build_sequences(kept, older, BASKETS, KeepRule(8, 4)).to_pylist()
    assert [row["num_events_total"] for row in rows] == [100, 1]
    assert [row["first_index"] for row in rows] == [92, 0]
