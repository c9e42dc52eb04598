"""Baselines against loops over users, events and candidates."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.arrays import NO_EVENT_TS, Histories
from longer.training.baselines import count_in_history, item_counts, popularity


def histories_of(items_of_users: list[list[int]], first_index: list[int]) -> Histories:
    """Users whose events are one second apart; `first_index` events of each are no longer kept."""
    lengths = [len(items) for items in items_of_users]
    return Histories(
        user_key_B=np.arange(len(lengths)) + 1,
        offsets_B1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        first_index_B=np.array(first_index, np.int64),
        prev_event_ts_B=np.full(len(lengths), NO_EVENT_TS),
        event_ts_E=np.concatenate([np.arange(n) * 1000 for n in lengths]).astype(np.int64),
        features={"item_id": np.array([i for items in items_of_users for i in items], np.int64)},
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[tuple[int, int, int]]]:
    users = draw(st.lists(st.lists(st.integers(1, 5), max_size=12), min_size=1, max_size=4))
    first = [draw(st.integers(0, 5)) for _ in users]
    asked = []
    for _ in range(draw(st.integers(0, 10))):
        row = draw(st.integers(0, len(users) - 1))
        end = first[row] + draw(st.integers(0, len(users[row])))
        asked.append((row, end, draw(st.integers(1, 7))))
    return users, first, asked


@given(cases(), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_counts_equal_counting_one_by_one(case: tuple, last: int) -> None:
    users, first, asked = case
    rows, ends, items = (np.array([a[i] for a in asked], np.int64) for i in range(3))
    in_last, in_all = count_in_history(histories_of(users, first), rows, ends, items, [last, None])
    for i, (row, end, item) in enumerate(asked):
        before = users[row][: end - first[row]]
        assert in_all[i] == before.count(item)
        assert in_last[i] == before[-last:].count(item)


def test_popularity_adds_up_buckets_and_ignores_events_after_training() -> None:
    parts = [item_counts(histories_of(users, [0] * len(users)), 2000) for users in ([[1, 1, 3]], [[1, 2], [2]], [[]])]
    assert popularity(parts, np.array([1, 2, 3, 9])).tolist() == [3, 2, 0, 0]
