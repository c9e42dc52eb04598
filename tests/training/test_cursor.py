"""The data cursor: nothing is skipped or repeated, whatever the number of workers and wherever a run resumes."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longer.errors import UserError
from longer.training.cursor import DataCursor, Position, batches_per_worker, divide

COSTS = st.lists(st.integers(1, 40), min_size=1, max_size=80)


def cursor_of(costs: list[int], budget: int, key: str = "table/0", num_epochs: int = 2) -> DataCursor:
    """A cursor whose budget is at least the smallest that is allowed."""
    cost = np.array(costs, np.int64)
    return DataCursor(key, cost, [np.arange(len(cost))] * num_epochs, max(budget, 3 * int(cost.max())))


def packs_of_step(cursor: DataCursor, position: Position, num_batches: int = 1) -> list[np.ndarray]:
    plan = cursor.plan(position.epoch, num_batches)
    return [plan.batch(position.step, batch) for batch in range(num_batches)]


@given(COSTS, st.integers(1, 300), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_an_epoch_holds_every_pack_once_and_batches_together_are_the_step(
    costs: list[int], budget: int, num_batches: int
) -> None:
    cursor, seen = cursor_of(costs, budget), []
    for step in range(cursor.steps_of(1)):
        everyone = packs_of_step(cursor, Position(1, step))[0]
        shares = packs_of_step(cursor, Position(1, step), num_batches)
        assert sorted(np.concatenate(shares)) == sorted(everyone)
        seen.append(everyone)
    assert sorted(np.concatenate(seen)) == list(range(len(costs)))


@given(COSTS, st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_steps_cost_about_the_same_and_none_is_empty_or_above_the_budget(costs: list[int], budget: int) -> None:
    cursor, cost = cursor_of(costs, budget), np.array(costs)
    fair = cost.sum() / cursor.steps_of(0)
    step_costs = cursor.plan(0, 1).sums(cost)[:, 0]
    assert len(step_costs) == cursor.steps_of(0)
    assert (step_costs > 0).all()
    assert (step_costs <= max(budget, 3 * cost.max())).all()
    assert (np.abs(step_costs - fair) <= cost.max()).all()


@given(COSTS, st.integers(60, 200), st.data())
@settings(max_examples=100, deadline=None)
def test_resuming_with_another_number_of_workers_goes_on_with_the_same_steps(
    costs: list[int], budget: int, data: st.DataObject
) -> None:
    whole = cursor_of(costs, budget)
    position, trained = Position(), []
    stop = data.draw(st.integers(0, whole.num_steps))
    for total in range(whole.num_steps):
        cursor, workers = (whole, 2) if total < stop else (cursor_of(costs, budget), 3)
        trained += packs_of_step(cursor, position, workers)
        assert cursor.global_step(position) == total
        position = cursor.after(position)
    assert position == Position(2, 0)
    assert whole.global_step(position) == whole.num_steps
    assert np.bincount(np.concatenate(trained)).tolist() == [2] * len(costs)


@pytest.mark.parametrize("start", [Position(), Position(0, 2), Position(1, 0), Position(2, 0)])
@pytest.mark.parametrize("every", [1, 3, 100])
def test_as_many_checkpoints_are_announced_as_are_made_from_wherever_a_run_resumes(start: Position, every: int) -> None:
    cursor = cursor_of([10] * 20, 30)
    position, num_made = start, 0
    while position.epoch < cursor.num_epochs:
        position = cursor.after(position)
        num_made += cursor.global_step(position) % every == 0 or position.step == 0
    assert cursor.num_saves(start, every) == num_made


def test_epochs_of_different_packs_follow_one_another() -> None:
    days = [np.array([0, 3]), np.array([1, 2, 4, 5, 6, 7])]
    cursor = DataCursor("table/0", np.full(8, 10), days, 30)
    assert [cursor.steps_of(0), cursor.steps_of(1), cursor.num_steps] == [1, 3, 4]
    assert cursor.after(Position(0, 0)) == Position(1, 0)
    assert sorted(packs_of_step(cursor, Position(0, 0))[0]) == [0, 3]
    second_day = [packs_of_step(cursor, Position(1, step))[0] for step in range(3)]
    assert sorted(np.concatenate(second_day)) == [1, 2, 4, 5, 6, 7]


def test_order_changes_with_epoch_and_key_and_never_else() -> None:
    def order(key: str, epoch: int) -> list[int]:
        cursor = cursor_of([1] * 100, 11, key)
        return [int(p) for step in range(10) for p in packs_of_step(cursor, Position(epoch, step))[0]]

    assert order("table/0", 0) == order("table/0", 0)
    assert len({tuple(order(key, epoch)) for key in ("table/0", "table/1", "other/0") for epoch in (0, 1)}) == 6
    assert order("table/0", 0)[:5] == [22, 48, 57, 23, 63], "golden: another order would break every resume"


def divided_one_by_one(costs: np.ndarray, num_batches: int) -> list[int]:
    """The rule for one step, in plain Python."""
    load, batches = [0] * num_batches, [0] * len(costs)
    for pack in sorted(range(len(costs)), key=lambda p: (-costs[p], p)):
        batches[pack] = load.index(min(load))
        load[batches[pack]] += costs[pack]
    return batches


@given(st.lists(st.lists(st.integers(1, 1000), min_size=1, max_size=20), min_size=1, max_size=6), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_all_steps_divided_at_once_are_each_divided_costliest_first(steps: list[list[int]], num_batches: int) -> None:
    step_P = np.repeat(np.arange(len(steps)), [len(costs) for costs in steps])
    found = divide(np.concatenate(steps), step_P, num_batches)
    for step, costs in enumerate(map(np.array, steps)):
        mine = found[step_P == step]
        assert mine.tolist() == divided_one_by_one(costs, num_batches)
        loads = np.bincount(mine, costs, num_batches)
        assert loads.max() <= costs.sum() / num_batches + costs.max()


@example([7] * 8, 60, 1, 20)
@given(COSTS, st.integers(1, 300), st.integers(1, 4), st.integers(1, 200))
@settings(max_examples=150, deadline=None)
def test_no_batch_exceeds_its_limit_on_any_number_of_workers(
    costs: list[int], budget: int, num_workers: int, limit: int
) -> None:
    costliest = max(costs)
    budget, limit = max(budget, 3 * costliest), max(limit, 2 * costliest)
    per_worker = batches_per_worker(budget, costliest, num_workers, limit)
    plan = cursor_of(costs, budget).plan(0, num_workers * per_worker)
    assert plan.sums(np.array(costs)).max() <= limit


def test_budgets_too_small_for_the_costliest_pack_are_refused() -> None:
    with pytest.raises(UserError, match=r"tokens_per_step=29: .* compute 10 .* raise it to 30"):
        DataCursor("table/0", np.array([1, 10]), [np.arange(2)], 29)
    with pytest.raises(UserError, match=r"max_tokens_per_batch=19: .* compute 10 .* raise it to 20"):
        batches_per_worker(30, 10, 1, 19)
