"""What a replica captures before it is ready is what its first requests need: a graph that is captured later stalls a batch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from longer.arrays import power_of_two
from longer.model.captured_growth import room_for
from longer.model.engine import StateEngine
from longer.model.grow import grow
from longer.model.growth import Growth, Room
from longer.model.longer import Longer
from longer.model.states import rows_for
from longer.serving import warm
from longer.serving.history import HistorySource, UserHistory
from longer.serving.room import BATCH_USERS
from longer.serving.scorer import Scorer
from longer.serving.store import StateStore
from tests.model.generate import random_histories, small_model
from tests.serving.tables import build_world, checkpoint_path


def warmed_up(
    model: Longer, num_users: int, grown: Callable[[Growth], None], monkeypatch: pytest.MonkeyPatch
) -> tuple[StateStore, StateEngine, set[tuple[int, Room]], np.random.Generator]:
    """A store and an engine after warm-up; the set holds the size of every growth, those to come too."""
    store, rng, sizes = StateStore(model, 0), np.random.default_rng(0), set[tuple[int, Room]]()
    engine = StateEngine(model, store.pool)

    def noted(growth: Growth) -> None:
        users = power_of_two(len(growth.events))
        sizes.add((users, room_for(growth, users)))
        grown(growth)

    def user(history: HistorySource, schema: object, num_events: int) -> UserHistory:
        return UserHistory(random_histories(rng, [num_events]), 0)

    engine._grow = noted
    monkeypatch.setattr(warm, "_user", user)
    warm.warm_up(engine, store, None, num_users, 5)  # type: ignore[arg-type]  (the user is made up above)
    return store, engine, sizes, rng


@pytest.mark.parametrize("num_users", [1, 4])
def test_users_who_do_a_little_need_no_graph_that_warm_up_did_not_capture(
    num_users: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(0, torch.float32, history_events=300, query_groups=50, stride_groups=50)
    store, engine, sizes, rng = warmed_up(model, num_users, lambda growth: grow(model, growth), monkeypatch)
    warmed = set(sizes)
    whole, rows = random_histories(rng, [500] * num_users), np.arange(num_users)
    for begin in (300, 440):
        end = np.full(num_users, begin)
        slots = store.slots(rows_for(store.layout, end))
        states = engine.encode(whole.slice_events(rows, rows * 0, end), slots)
        for step in [1, 8, 3]:
            slots = [
                state.slot if n <= state.slot.size else store.slots([n])[0]
                for state, n in zip(states, rows_for(store.layout, end + step), strict=True)
            ]
            states = engine.append(states, whole.slice_events(rows, end, end + step), slots)
            end = end + step
        assert (model.windows.history_start(end[0]) > model.windows.history_start(begin)) == (begin == 440)
        store.release()
    assert sizes == warmed


@pytest.mark.parametrize("num_users", [1, 4])
def test_users_who_stand_anywhere_need_no_graph_that_warm_up_did_not_capture(
    num_users: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Histories of any lengths are encoded together, and windows of one or another user move."""
    model = small_model(0, torch.float32, history_events=1_200, query_groups=50, stride_groups=50)
    store, engine, sizes, rng = warmed_up(model, num_users, lambda _: None, monkeypatch)
    warmed, num_moved, rows = set(sizes), list[int](), np.arange(num_users)
    whole = random_histories(rng, [1_800] * num_users)
    for _ in range(30):
        end = rng.integers(0, 1_700, num_users)
        slots = store.slots(rows_for(store.layout, end * 0 + 1_400))
        states = engine.encode(whole.slice_events(rows, model.windows.history_start(end) * 3, end), slots)
        for _ in range(5):
            begin, end = end, end + rng.integers(0, 8, num_users)
            grown = engine.append(states, whole.slice_events(rows, begin, end), slots)
            num_moved.append(sum(a.query_first != b.query_first for a, b in zip(states, grown, strict=True)))
            states = grown
        store.release()
    assert {0, 1} <= set(num_moved)
    assert sizes == warmed


def test_a_wave_of_the_most_users_is_warmed_up_in_a_store_without_any_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = small_model(0, torch.float32), np.random.default_rng(0)
    store = StateStore(model, 0)

    def user(history: HistorySource, schema: object, num_events: int) -> UserHistory:
        return UserHistory(random_histories(rng, [num_events]), 0)

    monkeypatch.setattr(warm, "_user", user)
    warm.warm_up(StateEngine(model, store.pool), store, None, BATCH_USERS, 2)  # type: ignore[arg-type]
    assert store.pool.slots.used_units == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="elsewhere one batch is warmed up, whatever is asked")
def test_no_batch_is_warmed_up_that_is_larger_than_a_wave(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    scorer = Scorer(checkpoint_path(world), world.path("tables", "sequences"), 0, device="cuda")
    assert len(list(scorer.warm_ups(4 * BATCH_USERS, 3))) == BATCH_USERS
