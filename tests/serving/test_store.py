"""Whatever happened to a state on the way, its scores are those of a full recomputation: the contract's sixth section, whole."""

import gc
import weakref
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.arrays import Histories
from longer.model.longer import Longer
from longer.model.pinned import pinned_words
from longer.model.pool import StatePool
from longer.model.state_layout import Precision, StateLayout
from longer.model.states import UserState, append, computing_dtype, encode, rows_for, score
from longer.serving.cache import Entry, Known, StateVersion, Tier
from longer.serving.fingerprint import EventPrint
from longer.serving.kept_states import pack, unpack
from longer.serving.store import StateStore
from tests.model.generate import random_candidates, random_histories, small_model
from tests.model.reference import reference_outputs
from tests.model.tolerances import OF_TESTED_MODELS as SHORTENED

NO_EVENTS = EventPrint(0, 0, np.zeros(1, np.uint64), np.uint64(0))
NUM_USERS, MOST_EVENTS = 6, 60
REQUEST_TS = 2_000_000_000_000
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="has no GPU"))]
EXACT: dict[Longer, Longer] = {}
"""Models with the same weights in float64 on the CPU."""


@cache
def models_for(precision: Precision, device: str) -> list[Longer]:
    dtype = torch.float64 if precision == "float64" else torch.float32
    models = [small_model(seed, dtype).to(device) for seed in (0, 1)]
    EXACT.update({model: small_model(seed) for seed, model in enumerate(models)})
    return models


EXACTLY: dict[Precision, float] = {"float64": 1e-10, "float32": 1e-5}
"""Relative, and absolute near zero."""
IN_BF16 = 0.02
"""Most that a probability of these models moves where products are in bf16 too: on a GPU, whatever a state is kept in."""


class World:
    """Users who do something, models that come and go, and a store too small for all of them."""

    def __init__(self, precision: Precision, seed: int, num_device: int, num_host: int, device: str = "cpu") -> None:
        self.rng, self.models = np.random.default_rng(seed), models_for(precision, device)
        self.histories = random_histories(self.rng, [MOST_EVENTS] * NUM_USERS)
        self.end_U = np.zeros(NUM_USERS, np.int64)
        self.store = StateStore(self.models[0], 0, 0, precision)
        state_bytes = self.store.layout.largest_rows * self.store.layout.row_bytes
        self.store = StateStore(self.models[0], num_device * state_bytes, num_host * state_bytes, precision)
        self.version, self.precision = 0, precision

    @property
    def model(self) -> Longer:
        return self.models[self.version]

    def events(self, users: list[int], begin: np.ndarray, end: np.ndarray) -> Histories:
        return self.histories.slice_events(np.array(users), begin, end)

    def ask(self, users: list[int]) -> None:
        """One batch: what is held is brought and appended to, what is not is encoded; then all are scored together."""
        store, end_B = self.store, self.end_U[users]
        version = StateVersion(f"m{self.version}", "s", "appendable")
        taken = {user: store.take(user, version) for user in users}
        store.bring(held for held in taken.values() if held)
        states: dict[int, UserState] = {}
        for is_held in (True, False):
            group = [user for user in users if (taken[user] is not None) == is_held]
            if not group:
                continue
            end = self.end_U[group]
            needed = rows_for(store.layout, end)
            if is_held:
                bases = [held.entry.state for user in group if (held := taken[user])]
                slots = [
                    b.slot if n <= b.slot.size else store.slots([n])[0] for b, n in zip(bases, needed, strict=True)
                ]
                begin = np.array([base.num_events for base in bases])
                grown = append(self.model, store.pool, bases, self.events(group, begin, end), slots)
            else:
                grown = encode(self.model, store.pool, self.events(group, end * 0, end), store.slots(needed))
            for user, state in zip(group, grown, strict=True):
                entry = Entry(state, 0, 0, Known("t", 0), NO_EVENTS, True)
                held = taken[user]
                if held and held.entry.state.slot is state.slot:
                    store.update(user, entry)
                else:
                    store.put(user, version, entry)
                states[user] = state
        candidates = random_candidates(self.rng, self.rng.integers(0, 4, len(users)).tolist())
        request_ts = np.full(len(users), REQUEST_TS)
        scores = score(self.model, store.pool, [states[user] for user in users], request_ts, candidates)
        whole = self.events(users, end_B * 0, end_B)
        self.check(scores, reference_outputs(EXACT[self.model], whole, request_ts, candidates))

    def check(self, scores: np.ndarray, expected: np.ndarray) -> None:
        if self.precision in EXACTLY:
            tolerance = EXACTLY[self.precision]
            np.testing.assert_allclose(scores, expected, rtol=tolerance, atol=tolerance)
        else:
            probabilities = (
                torch.from_numpy(np.asarray(x, np.float64)[:, 0]).sigmoid().numpy() for x in (scores, expected)
            )
            is_in_bf16 = computing_dtype(self.model, self.store.pool) == torch.bfloat16
            tolerance = IN_BF16 if is_in_bf16 else SHORTENED[self.precision]
            np.testing.assert_allclose(*probabilities, rtol=0, atol=tolerance)

    def restart(self) -> None:
        """Another store takes in what this one leaves."""
        old, version = self.store, StateVersion(f"m{self.version}", "s", "appendable")
        self.store = StateStore(self.model, old.budget_bytes, old.host_budget_bytes, self.precision)
        kept, tables = [(held, is_hot, old.words(held)) for held, is_hot in old.hottest(version)], list[str]()
        states = unpack(pack(kept, tables, lambda _: 0), ["any"] * len(kept), tables) if kept else ()
        for (held, _, _), state in zip(kept, states, strict=True):
            self.store.restore(held.user_key, version, state.entry, state.words_NI, state.is_protected)


BATCH = st.lists(st.tuples(st.integers(0, NUM_USERS - 1), st.integers(0, 12)), min_size=1, max_size=NUM_USERS)


LIVES = {
    "seed": st.integers(0, 2**32 - 1),
    "budgets": st.sampled_from([(0, 0), (2, 0), (0, 3), (2, 2), (9, 0)]),
    "batches": st.lists(
        st.tuples(BATCH, st.sampled_from(["", "", "", "", "other model", "forget", "restart"])), min_size=3, max_size=12
    ),
}
"""Random appends across window moves, eviction to host memory and back, other models, forgetting, restarts, batches that mix all"""


def live(
    precision: Precision,
    device: str,
    seed: int,
    budgets: tuple[int, int],
    batches: list[tuple[list[tuple[int, int]], str]],
) -> None:
    """Each batch's scores are compared with the float64 reference, and each byte is accounted for."""
    world = World(precision, seed, *budgets, device)
    for batch, happening in batches:
        if happening == "other model":
            world.version = 1 - world.version
            world.store.serve(StateVersion(f"m{world.version}", "s", "appendable"))
        elif happening == "forget":
            world.store.forget(batch[0][0])
        elif happening == "restart":
            world.restart()
        for user, num_new in batch:
            world.end_U[user] = min(MOST_EVENTS, world.end_U[user] + num_new)
        with torch.compiler.set_stance("force_eager"):  # compiled, it is tested by test_replica.py
            world.ask(list(dict.fromkeys(user for user, _ in batch)))
        world.store.release()
        check_bytes(world.store)


def check_bytes(store: StateStore) -> None:
    """No tier holds more than its budget, and every row that is taken is some state's, or its copy in host memory."""
    assert store.num_bytes <= store.budget_bytes
    assert store.host_bytes <= store.host_budget_bytes
    assert store.pool.slots.used_units * store.layout.row_bytes == store.num_bytes
    if store._host is not None:
        num_copied = sum(slot.size for slot in store._copied_from.values())
        assert (store._host.slots.used_units - num_copied) * store.layout.row_bytes == store.host_bytes
        assert all(held.tier == Tier.DEVICE for held in store._copied_from)


Batches = list[tuple[list[tuple[int, int]], str]]


@pytest.mark.parametrize("precision", EXACTLY)
@given(**LIVES)
@settings(max_examples=30, deadline=None)
def test_no_history_of_a_state_shows_in_its_scores(
    precision: Precision, seed: int, budgets: tuple[int, int], batches: Batches
) -> None:
    """Slow: each example has up to twelve batches, and the float64 reference of each."""
    live(precision, "cpu", seed, budgets, batches)


@pytest.mark.parametrize("precision", SHORTENED)
@given(**LIVES)
@settings(max_examples=8, deadline=None)
def test_no_history_of_a_state_moves_its_scores_beyond_what_fewer_bits_do(
    precision: Precision, seed: int, budgets: tuple[int, int], batches: Batches
) -> None:
    live(precision, "cpu", seed, budgets, batches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies between a GPU and pinned memory")
@pytest.mark.parametrize("precision", [*EXACTLY, *SHORTENED])
@given(**LIVES)
@settings(max_examples=6, deadline=None)
def test_no_history_of_a_state_on_a_gpu_shows_in_its_scores(
    precision: Precision, seed: int, budgets: tuple[int, int], batches: Batches
) -> None:
    """Slow: kernels are launched one by one."""
    live(precision, "cuda", seed, budgets, batches)


@pytest.mark.parametrize("device", DEVICES)
def test_states_that_move_between_tiers_beside_other_work_keep_every_byte(device: str) -> None:
    """Each slot is filled with a number of its own; a GPU is kept behind, so that a copy which does not wait copies another."""
    model, rng = (
        small_model(0, torch.float32, history_events=3_000, event_width=16).to(device),
        np.random.default_rng(0),
    )
    layout = StateLayout.of(model, "float32")
    largest_bytes = layout.largest_rows * layout.row_bytes
    store = StateStore(model, 3 * largest_bytes, 7 * largest_bytes, "float32")
    with torch.compiler.set_stance("force_eager"):
        [empty] = encode(model, store.pool, random_histories(rng, [0]), store.slots([1]))
    store.release()
    version, number_of, wrong = StateVersion("m", "s", "appendable"), dict[int, int](), []
    for step in range(400 if device == "cuda" else 100):
        users = rng.choice(14, 4, replace=False).tolist()
        taken = {user: store.take(user, version) for user in users}
        store.bring(held for held in taken.values() if held)
        for user, held in taken.items():
            slot = held.entry.state.slot if held else store.slots([layout.largest_rows])[0]
            words_NI = store.pool.words_NI[slot.start : slot.start + slot.size]
            if held:
                wrong.append((words_NI != number_of[user]).any())
            if device == "cuda" and rng.random() < 0.3:
                torch.cuda._sleep(int(rng.integers(2_000_000)))  # cycles
            if held and rng.random() < 0.5:
                continue
            number_of[user] = 100 * step + user
            words_NI.fill_(number_of[user])
            entry = Entry(replace(empty, slot=slot), 0, 0, Known("t", 0), NO_EVENTS, True)
            if held:
                store.update(user, entry)
            else:
                store.put(user, version, entry)
        store.release()
        check_bytes(store)
    counters = store.counters
    assert min(counters.promote, counters.demote, counters.evict) > 40
    assert not torch.stack(wrong).any()
    for held, _ in store.hottest(version):
        assert (store.words(held) == number_of[held.user_key]).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_grown", [False, True])
def test_a_state_that_goes_as_it_came_is_not_copied_and_one_that_grew_is(has_grown: bool, device: str) -> None:
    world = World("float32", 0, 0, 3, device)
    world.end_U += 20
    with torch.compiler.set_stance("force_eager"):
        world.ask([0])
    store = world.store
    store.release()
    held = store.take(0, StateVersion("m0", "s", "appendable"))
    assert held is not None
    before = store.words(held)
    store.bring([held])
    slot = held.entry.state.slot
    store.pool.words_NI[slot.start : slot.start + slot.size] = 9
    if has_grown:
        store.update(0, replace(held.entry, state=replace(held.entry.state)))
    store.release()
    assert store.num_bytes == 0
    assert torch.equal(store.words(held), torch.full_like(before, 9) if has_grown else before)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_left_of_a_user_who_is_forgotten_in_any_tier(device: str) -> None:
    world = World("float32", 0, 2, 2, device)
    for _ in range(2):
        world.end_U += 20
        for user in range(NUM_USERS):
            with torch.compiler.set_stance("force_eager"):
                world.ask([user])
            world.store.release()
    assert world.store.counters.demote > 0
    assert world.store.counters.evict > 0
    assert world.store._host is not None
    pools, histories = [world.store.pool, world.store._host], world.histories

    def times_of(user: int) -> int:
        """How often times of the user's own events, which are rarely the same by chance, are anywhere in memory."""
        own_E, end = slice(*histories.offsets_B1[user : user + 2]), world.end_U[user]
        own_ts = np.setdiff1d(histories.event_ts_E[own_E][:end], np.delete(histories.event_ts_E, own_E))
        return sum(int(np.isin(pool.words_I.cpu().numpy(), own_ts).sum()) for pool in pools)

    assert (
        max(times_of(user) for user in range(NUM_USERS)) > 40
    )  # more than its events: in a slot that it moved out of, too
    stale = next(user for user in range(NUM_USERS) if world.store._index.find(user))
    world.store.drop_stale(stale)
    assert times_of(stale) > 0  # nothing is held of the user, and yet something is left
    forgotten = 0
    for user in [stale, *range(NUM_USERS)]:
        forgotten += world.store.forget(user)
        assert times_of(user) == 0
    assert forgotten == world.store.counters.forget == 3
    assert not any(pool.words_I.any() for pool in pools)
    assert (len(world.store), world.store.num_bytes, world.store.host_bytes) == (0, 0, 0)
    assert world.store.pool.slots.used_units == 0
    assert not any(user in world.store._index._gone for user in range(NUM_USERS))


def test_a_state_keeps_no_array_of_another_user_who_may_be_forgotten() -> None:
    """The newest events of a whole batch would live as long as any of its users, and those of a whole dump."""
    world = World("float32", 0, 4, 2)
    for _ in range(2):
        world.end_U += 20
        world.ask([0, 1, 2])
        world.store.release()
    kept = [
        (held, asked_again, world.store.words(held))
        for held, asked_again in world.store.hottest(StateVersion("m0", "s", "appendable"))
    ]
    tables = list[str]()
    packed = pack(kept, tables, lambda _: 0)
    entries = [held.entry for held, *_ in kept] + [one.entry for one in unpack(packed, ["any"] * len(kept), tables)]
    assert len(entries) == 6
    for partial in (entry.state.partial for entry in entries):
        assert len(partial.event_ts_E)
        own = (partial.user_key_B, partial.event_ts_E, partial.prev_event_ts_B, *partial.features.values())
        assert all(array.base is None for array in own)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pins memory for CUDA")
def test_pinned_memory_is_as_large_as_asked_and_copies_both_ways() -> None:
    words = pinned_words((1 << 20) + 7)
    assert (words.is_pinned(), words.nbytes) == (True, words.untyped_storage().nbytes())
    words.copy_(torch.arange(len(words)))
    there = words.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    words.fill_(0)
    words.copy_(there, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(words, torch.arange(len(words)))


def test_a_model_of_another_shape_finds_none_of_the_old_states() -> None:
    world = World("float32", 0, 4, 0)
    world.end_U += 20
    world.ask([0, 1])
    world.store.release()
    other = small_model(3, torch.float32, event_width=8)
    world.store.fit(other)
    assert (len(world.store), world.store.counters.stale) == (0, 2)
    world.models, EXACT[other] = [other], small_model(3, event_width=8)
    world.ask([0, 1])


def test_a_pool_that_nobody_holds_gives_its_memory_back_at_once() -> None:
    """A roll-out to another shape allocates the next pool at once: what waits for the garbage collector is there twice."""
    layout = StateLayout.of(small_model(), "float32")
    pool = StatePool(layout, layout.largest_rows * layout.row_bytes)
    gone = weakref.ref(pool)
    gc.disable()
    try:
        del pool
        assert gone() is None
    finally:
        gc.enable()
