"""What a store holds in its two tiers, who goes, and what is left in memory; states of any size, in batches of one."""

import gc
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch

from longer.arrays import NO_EVENT_TS, Histories
from longer.errors import UserError
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.state_layout import StateLayout
from longer.model.states import encode, rows_for
from longer.model_settings import ModelSettings
from longer.schema import EventSchema, Feature
from longer.serving.cache import Entry, Known, StateVersion
from longer.serving.fingerprint import EventPrint, event_marks
from longer.serving.room import check_card
from longer.serving.store import StateStore
from tests.model.generate import TASKS, random_histories, small_model

NO_EVENTS = EventPrint(0, 0, np.zeros(1, np.uint64), np.uint64(0))
OLD, NEW = StateVersion("m1", "s", "appendable"), StateVersion("m2", "s", "appendable")
MODEL = small_model(0, torch.float32)
LAYOUT = StateLayout.of(MODEL, "float32")
LARGEST, SMALLEST = LAYOUT.largest_rows, StatePool.sizes_of(LAYOUT)[0]


class Room:
    """A store whose states are empty ones, with room for so many of the largest in each tier."""

    def __init__(self, num_device: float, num_host: float) -> None:
        largest_bytes = LARGEST * LAYOUT.row_bytes
        self.store = StateStore(MODEL, int(num_device * largest_bytes), int(num_host * largest_bytes), "float32")
        self.version = OLD
        no_events = random_histories(np.random.default_rng(0), [0])
        [self.empty] = encode(MODEL, self.store.pool, no_events, self.store.slots([1]))
        self.store.release()

    def serve(self, version: StateVersion) -> None:
        self.version = version
        self.store.serve(version)

    def entry(self) -> Entry:
        return Entry(self.empty, 0, 0, Known("t", 0), NO_EVENTS, True)

    def put(self, user: int, num_rows: int) -> None:
        [slot] = self.store.slots([num_rows])
        self.store.put(user, self.version, replace(self.entry(), state=replace(self.empty, slot=slot)))
        self.store.release()

    def ask(self, user: int, num_rows: int = LARGEST) -> bool:
        """Whether it is a hit."""
        if (held := self.store.take(user, self.version)) is None:
            self.put(user, num_rows)
            return False
        self.store.bring([held])
        self.store.release()
        return True

    def act(self, user: int) -> None:
        """Events of the user come in: what is held grows, in its slot or in another."""
        if (held := self.store.hold(user, self.version)) is None:
            return
        self.store.bring([held])
        if user % 2:
            self.store.update(user, replace(held.entry, state=replace(held.entry.state)))
            self.store.release()
        else:
            self.put(user, LARGEST)

    def num_hits(self, users: Iterable[int]) -> int:
        return sum([self.ask(user) for user in users])

    def num_held(self, users: Iterable[int]) -> int:
        return sum(self.store._index.find(user) is not None for user in users)


@pytest.mark.parametrize(
    ("num_device", "num_host", "num_hot"),
    [(10, 0, 8), (10, 40, 8), (10, 40, 30), (10, 40, 40), (4, 100, 82), (0, 10, 8)],
)
def test_one_scan_of_cold_users_does_not_push_out_the_hot_ones_of_either_tier(
    num_device: int, num_host: int, num_hot: int
) -> None:
    room, hot = Room(num_device, num_host), range(num_hot)
    for _ in range(2):
        room.num_hits(hot)
    assert room.num_hits(range(10_000, 10_300)) == 0
    assert room.num_held(hot) == num_hot
    assert room.num_hits(hot) == num_hot


@pytest.mark.parametrize(("num_device", "num_host", "num_hot"), [(10, 0, 8), (10, 40, 30), (4, 100, 82)])
def test_visitors_who_each_ask_twice_do_not_push_out_the_hot_ones(num_device: int, num_host: int, num_hot: int) -> None:
    """For a second page: the state is there, or was brought back from host memory, and its user has not come back."""
    room, hot = Room(num_device, num_host), range(num_hot)
    for _ in range(2):
        room.num_hits(hot)
    for visitor in range(10_000, 10_300):
        assert [room.ask(visitor) for _ in range(2)] == [False, True]
    assert room.num_hits(hot) == num_hot


@pytest.mark.parametrize(("num_device", "num_host", "num_hot"), [(10, 0, 8), (10, 40, 30), (4, 100, 82)])
def test_visitors_who_are_asked_about_once_and_then_act_do_not_push_out_the_hot_ones(
    num_device: int, num_host: int, num_hot: int
) -> None:
    """A visitor's clicks are no sign that anyone will ask for the visitor again."""
    room, hot = Room(num_device, num_host), range(num_hot)
    for _ in range(2):
        room.num_hits(hot)
    for visitor in range(10_000, 10_300):
        assert not room.ask(visitor)
        for _ in range(3):
            room.act(visitor)
    assert room.num_hits(hot) == num_hot


@pytest.mark.parametrize(("num_device", "num_host", "num_hot"), [(10, 0, 6), (10, 20, 22)])
def test_the_cache_does_not_stay_at_no_hits_when_other_users_become_the_hot_ones(
    num_device: int, num_host: int, num_hot: int
) -> None:
    room = Room(num_device, num_host)
    for _ in range(3):
        room.num_hits(range(100, 100 + int(0.8 * (num_device + num_host))))
    rounds = [room.num_hits(range(num_hot)) for _ in range(3)]
    assert rounds[2] == num_hot


@pytest.mark.parametrize(("num_device", "num_host", "num_hot"), [(10, 0, 6), (10, 20, 30)])
def test_the_cache_does_not_stay_at_no_hits_after_a_roll_out(num_device: int, num_host: int, num_hot: int) -> None:
    room = Room(num_device, num_host)
    for _ in range(3):
        room.num_hits(range(100, 100 + int(0.8 * (num_device + num_host))))
    room.serve(NEW)
    num_evicted = room.store.counters.evict
    assert [room.num_hits(range(num_hot)) for _ in range(3)] == [0, num_hot, num_hot]
    assert (
        room.store.counters.evict == num_evicted
    )  # or autoscaling would take a roll-out for a cache that is too small


def test_a_card_without_fp8_is_told_at_load_and_not_by_its_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an A100")
    for capability in ((8, 0), (8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        check_card("int8", torch.device("cuda"))
        if capability >= (8, 9):
            check_card("fp8", torch.device("cuda"))
        else:
            with pytest.raises(UserError, match=r"state_precision: an A100 has no fp8 .*: set int8 or bf16"):
                check_card("fp8", torch.device("cuda"))


def test_states_of_a_model_that_is_not_served_are_free_room_for_warm_up_and_dumps() -> None:
    room = Room(2, 4)
    free_bytes = room.store.free_bytes
    for _ in range(2):
        room.num_hits(range(6))
    assert room.store.free_bytes == 0
    words = room.store.words(next(iter(room.store.hottest(OLD)))[0])
    assert not room.store.restore(10, OLD, room.entry(), words, True)
    room.serve(NEW)
    assert room.store.free_bytes == free_bytes
    assert [room.store.restore(user, NEW, room.entry(), words, True) for user in (10, 11, 0, 1, 12)] == [True] * 4 + [
        False
    ]
    assert room.num_hits([10, 11, 0, 1]) == 4
    assert room.store.host_bytes <= room.store.host_budget_bytes


def test_a_state_too_large_for_host_memory_takes_none_of_the_others_with_it() -> None:
    room = Room(0, 0.9)
    for user in range(2):
        room.put(user, SMALLEST)
    room.put(99, LARGEST)
    assert (room.num_held(range(2)), room.num_held([99]), room.store.counters.evict) == (2, 0, 1)


def test_states_of_all_sizes_fill_host_memory_up_to_its_budget() -> None:
    """What lies idle lies beside the budget: nobody goes before the budget is full."""
    room, rng = Room(0, 10), np.random.default_rng(0)
    for user in range(1_500):
        before = room.store.counters.evict
        num_rows = int(rng.integers(SMALLEST, LARGEST + 1))
        would_be_bytes = room.store.host_bytes + room.store.pool.slots.size_for(num_rows) * LAYOUT.row_bytes
        room.put(user, num_rows)
        assert (room.store.counters.evict > before) == (would_be_bytes > room.store.host_budget_bytes)


def test_a_large_full_host_tier_of_states_that_leave_the_end_of_each_slab_fails_no_batch() -> None:
    """What is left of slabs grows with their number, and so must what lies beside the budget."""
    assert 2 * LARGEST % SMALLEST
    room, most = Room(0, 600), 600 * LARGEST // SMALLEST
    for user in range(most):
        room.put(user, SMALLEST)
    assert (len(room.store), room.store.counters.evict) == (most, 0)
    for user in range(most, most + 10):
        room.put(user, SMALLEST)
    assert (len(room.store), room.store.counters.evict) == (most, 10)


def test_a_host_tier_without_a_slot_for_what_its_budget_has_room_for_loses_states_and_no_batch() -> None:
    """Were the room beside a budget ever counted too small, each batch would fail from then on."""
    room = Room(0, 4)
    host = room.store._host
    assert host is not None
    while host.slots.num_units - host.slots.used_units > 2 * LARGEST:
        host.slots.allocate(LARGEST)
    room.num_hits(range(5))
    assert (room.num_held(range(5)), room.num_held([3, 4]), room.store.counters.evict) == (2, 2, 3)
    for user in range(5):
        room.store.forget(user)
    while host.slots.allocate(LARGEST):
        pass
    assert not room.store.restore(5, OLD, room.entry(), torch.zeros(LARGEST, host.words_NI.shape[1]), True)
    room.put(6, LARGEST)
    assert (len(room.store), room.store.counters.evict) == (0, 4)


@pytest.mark.parametrize("budgets", [(2, 12), (0, 3), (1, 0), (3, 1)])
def test_what_is_free_takes_new_states_without_anybody_going_for_them(budgets: tuple[int, int]) -> None:
    """As warm-up counts: so many of the largest states, in one batch."""
    for seed in range(5):
        room, rng = Room(*budgets), np.random.default_rng(seed)
        store = room.store
        for user in range(60):
            num_new = int(store.free_bytes // store.most_state_bytes)
            if num_new:
                before = store.counters.evict
                slots = store.slots([LARGEST] * int(rng.integers(1, num_new + 1)))
                for number, slot in enumerate(slots):
                    entry = replace(room.entry(), state=replace(room.empty, slot=slot))
                    store.put(1_000 * user + number, OLD, entry)
                store.release()
                assert store.counters.evict == before
            room.put(user, int(rng.integers(SMALLEST, LARGEST + 1)))
            for _ in range(3):
                store.drop_stale(int(rng.integers(60)) * int(rng.choice([1, 1_000])))


@pytest.mark.parametrize(
    ("num_features", "merge_size", "stride_groups"), [(0, 1, 1), (0, 8, 4), (12, 8, 4), (24, 16, 2)]
)
def test_what_python_keeps_of_states_is_told_whatever_the_schema_and_the_strides(
    num_features: int, merge_size: int, stride_groups: int
) -> None:
    """Of many features they take three times as much as of none, and so they do of the shortest strides."""
    schema = EventSchema(
        features=tuple(Feature(name=f"f{n}", kind="categorical", of="event") for n in range(num_features))
    )
    sizes = {
        "history_events": 512,
        "query_groups": 8,
        "num_self_layers": 0,
        "event_width": 4,
        "num_heads": 1,
        "item_rows": 5,
    }
    asked = ModelSettings(merge_size=merge_size, stride_groups=stride_groups, interactions=False, **sizes)
    model, rng, num_users, num_events = Longer(asked, schema, TASKS[:1]).eval(), np.random.default_rng(0), 64, 511
    store, stride, none = StateStore(model, 1 << 30), model.windows.stride_events, np.zeros(1, np.int64)

    def put(user: int) -> None:
        features = {f"f{n}": rng.integers(1, 2**62, num_events) for n in range(num_features)}
        features = {"item_id": np.arange(num_events), "action": np.arange(num_events), **features}
        offsets, first = np.array([0, num_events]), none.copy()
        history = Histories(first + user, offsets, first, first + NO_EVENT_TS, np.arange(num_events) + user, features)
        [state] = encode(model, store.pool, history, store.slots(rows_for(store.layout, history.end_index_B)))
        events = (
            EventPrint.from_start(0).followed_by(event_marks(history), stride).from_index(state.first_index, stride)
        )
        store.put(user, OLD, Entry(state, 10**12 + user, 10**13 + user, Known("t", user), events, True, 10**6 + user))
        store.release()

    put(10**6)  # what is made once
    gc.collect()
    tracemalloc.start()
    try:
        for user in range(num_users):
            put(user)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] / num_users
    finally:
        tracemalloc.stop()
    told = store.index_bytes / len(store)
    assert taken < told < 1.6 * taken


def dirty(store: StateStore) -> None:
    for pool in (store.pool, store._host):
        if pool is not None:
            pool.words_NI.fill_(7)


def test_a_slot_that_is_given_out_holds_nothing_of_who_had_it_before() -> None:
    """A state does not fill its slot: what was left there would be dumped as another user's."""
    store = Room(4, 0).store
    dirty(store)
    slots = store.slots([SMALLEST, LARGEST, SMALLEST, LARGEST // 2])
    memory = [store.pool.words_NI[slot.start : slot.start + slot.size] for slot in slots]
    assert not any(words.any() for words in memory)
    assert (store.pool.words_NI == 7).all(1).sum() == len(store.pool.words_NI) - sum(len(words) for words in memory)


def test_a_dump_holds_nothing_that_is_not_its_users_own() -> None:
    """Of a state that went to host memory and back, into slots that others have left."""
    room = Room(1, 2)
    dirty(room.store)
    for _ in range(3):
        room.num_hits(range(3))
    assert room.store.counters.promote > 0
    for held, _ in room.store.hottest(OLD):
        assert not room.store.words(held).any()


@pytest.mark.parametrize("num_events", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 100])
def test_a_state_of_any_length_leaves_at_most_a_third_of_its_slot_unused(num_events: int) -> None:
    layout = StateLayout.of(small_model(0, torch.float32, history_events=1_200), "float32")
    [num_rows] = rows_for(layout, np.array([num_events])).tolist()
    slot_rows = next(size for size in StatePool.sizes_of(layout) if size >= num_rows)
    assert slot_rows - num_rows <= slot_rows / 3 + 1
