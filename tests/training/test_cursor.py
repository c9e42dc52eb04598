"""The data cursor: nothing is skipped or repeated, whatever the number of workers and wherever a run resumes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.training.cursor import DataCursor, Position, divide

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=60)


def cursor_of(sizes: list[int], per_step: int, key: str = "table/0") -> DataCursor:
    requests = np.array(sizes, np.int64)
    return DataCursor(key, requests, requests * 10 + 1, per_step)


@given(SIZES, st.integers(1, 20), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_an_epoch_holds_every_pack_once_and_workers_together_are_the_step(
    sizes: list[int], per_step: int, num_workers: int, epoch: int
) -> None:
    cursor, seen = cursor_of(sizes, per_step), []
    for step in range(cursor.steps_per_epoch):
        position = Position(epoch, step)
        everyone = cursor.packs_of_step(position)
        shares = [cursor.packs_of_worker(position, rank, num_workers) for rank in range(num_workers)]
        assert sorted(np.concatenate(shares)) == sorted(everyone)
        seen.append(everyone)
    assert sorted(np.concatenate(seen)) == list(range(len(sizes)))


@given(SIZES, st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_steps_are_about_equally_large_and_none_is_empty(sizes: list[int], per_step: int) -> None:
    cursor, requests = cursor_of(sizes, per_step), np.array(sizes)
    fair = requests.sum() / cursor.steps_per_epoch
    for step in range(cursor.steps_per_epoch):
        size = requests[cursor.packs_of_step(Position(0, step))].sum()
        assert size > 0
        assert abs(size - fair) <= requests.max()


@given(SIZES, st.integers(4, 12), st.data())
@settings(max_examples=100, deadline=None)
def test_resuming_with_another_number_of_workers_goes_on_with_the_same_steps(
    sizes: list[int], per_step: int, data: st.DataObject
) -> None:
    whole = cursor_of(sizes, per_step)
    position, trained = Position(), []
    stop = data.draw(st.integers(0, 2 * whole.steps_per_epoch))
    for total in range(2 * whole.steps_per_epoch):
        cursor, workers = (whole, 2) if total < stop else (cursor_of(sizes, per_step), 3)
        trained += [cursor.packs_of_worker(position, rank, workers) for rank in range(workers)]
        assert cursor.global_step(position) == total
        position = cursor.after(position)
    assert position == Position(2, 0)
    assert np.bincount(np.concatenate(trained)).tolist() == [2] * len(sizes)


def test_order_changes_with_epoch_and_key_and_never_else() -> None:
    def order(key: str, epoch: int) -> list[int]:
        cursor = cursor_of([1] * 100, 10, key)
        return [int(pack) for step in range(10) for pack in cursor.packs_of_step(Position(epoch, step))]

    assert order("table/0", 0) == order("table/0", 0)
    assert len({tuple(order(key, epoch)) for key in ("table/0", "table/1", "other/0") for epoch in (0, 1)}) == 6
    assert order("table/0", 0)[:5] == [22, 48, 57, 23, 63], "golden: another order would break every resume"


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=50), st.integers(1, 4))
def test_no_worker_does_more_than_a_fair_share_and_one_pack(costs: list[int], num_workers: int) -> None:
    cost = np.array(costs, np.int64)
    loads = [cost[share].sum() for share in divide(cost, num_workers)]
    assert max(loads) <= cost.sum() / num_workers + cost.max()
