"""Segments give back what went into them: however many the blocks, the distinct values, and one user's events."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from longer.data import segments
from longer.data.segments import read_segments, write_segments
from longer.data.sequences import KeepRule, Older, build_sequences
from longer.schema import EventSchema
from tests.data.logs import BASKETS, STRINGS, log, naive_sequences


def read_back(folder: Path, blocks: list[pa.Table], schema: EventSchema, rule: KeepRule) -> tuple[pa.Table, Older]:
    """The one bucket of the blocks."""
    written = []
    for number, block in enumerate(blocks):
        path = str(folder / f"block-{number}.arrow")
        start, end = write_segments(path, block, schema, 1, rule)
        written.append((path, start, end))
    return read_segments(written, schema, rule)


def test_more_distinct_ids_than_16_bits_count_come_back_from_many_blocks(tmp_path: Path) -> None:
    num_blocks, num_users = 170, 200
    blocks = []
    for block in range(num_blocks):
        rows = log([(block * num_users + user, 0, 1, 1) for user in range(num_users)], STRINGS)
        blocks.append(rows.set_column(0, "user_id", rows["user_id"].combine_chunks().dictionary_encode()))
    found, _ = read_back(tmp_path, blocks, STRINGS, KeepRule(1000, 2))
    assert set(found["user_id"].to_pylist()) == {f"id{user}" for user in range(num_blocks * num_users)}


@pytest.mark.parametrize("trim_rows", [1, 37, 10**9])
def test_a_user_who_fills_many_blocks_is_trimmed_as_they_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trim_rows: int
) -> None:
    monkeypatch.setattr(segments, "_TRIM_ROWS", trim_rows)
    rule, days = KeepRule(8, 2), np.random.default_rng(3).permutation(np.repeat(np.arange(90), 10)).tolist()
    events = log([(1 + (place % 7 == 0), day, place % 5, 1) for place, day in enumerate(days)])
    blocks = [events.slice(start, 30) for start in range(0, len(events), 30)]
    found, older = read_back(tmp_path, blocks, BASKETS, rule)
    assert build_sequences(found, older, BASKETS, rule).to_pylist() == naive_sequences(events, BASKETS, 8, 2)
    assert trim_rows > 1 or len(found) <= 2 * 2 * rule.most_needed
