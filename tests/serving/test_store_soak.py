"""A store over a long run of all that happens to it: every byte accounted for, every state as it was written, no room lost."""

import random
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch

from longer.model.pool import StatePool
from longer.model.state_layout import StateLayout
from longer.model.states import encode
from longer.serving.cache import Entry, Known, StateVersion, Tier
from longer.serving.fingerprint import EventPrint
from longer.serving.room import BATCH_USERS
from longer.serving.store import HeldState, StateStore
from longer.slots import Slot
from tests.model.generate import random_histories, small_model
from tests.serving.test_store import check_bytes

NO_EVENTS = EventPrint(0, 0, np.zeros(1, np.uint64), np.uint64(0))
VERSIONS = [StateVersion(f"m{n}", "s", "appendable") for n in range(2)]
NUM_USERS, NUM_DEVICE, NUM_HOST = 400, 40, 60
USERS = range(NUM_USERS)
ZIPF = list(accumulate((user + 1) ** -0.8 for user in USERS))


class Soak:
    """A store of states of all sizes, each a number of its own in all of its slot. An operation is a call, or a state that moves
    or has to go for one."""

    def __init__(self, device: str) -> None:
        self.rng, self.num_called, self.written = random.Random(0), 0, dict[int, int]()
        model = small_model(0, torch.float32).to(device)
        self.layout = StateLayout.of(model, "float32")
        self.smallest, self.largest = self.layout.smallest_rows, self.layout.largest_rows
        self.largest_bytes = self.largest * self.layout.row_bytes
        self.store = StateStore(model, NUM_DEVICE * self.largest_bytes, NUM_HOST * self.largest_bytes, "float32")
        no_events = random_histories(np.random.default_rng(0), [0])
        with torch.compiler.set_stance("force_eager"):
            [self.empty] = encode(model, self.store.pool, no_events, self.store.slots([1]))
        self.store.release()
        self.version = VERSIONS[0]
        self.store.serve(self.version)

    @property
    def num_operations(self) -> int:
        counters = self.store.counters
        return self.num_called + counters.evict + counters.stale + counters.demote + counters.promote

    def some_rows(self) -> int:
        return self.rng.randint(self.smallest, self.largest)

    def write(self, user: int, pool: StatePool, slot: Slot) -> None:
        self.written[user] = self.num_called
        pool.words_NI[slot.start : slot.start + slot.size].fill_(self.num_called)

    def entry(self, slot: Slot) -> Entry:
        return Entry(replace(self.empty, slot=slot), 0, 0, Known("t", 0), NO_EVENTS, True)

    def put(self, user: int, num_rows: int) -> None:
        [slot] = self.store.slots([num_rows])
        self.write(user, self.store.pool, slot)
        self.store.put(user, self.version, self.entry(slot))
        self.num_called += 2

    def grow(self, user: int, held: HeldState) -> None:
        """In its slot, or in another of any size."""
        if self.rng.random() < 0.5:
            self.put(user, self.some_rows())
            return
        self.write(user, self.store.pool, held.entry.state.slot)
        self.store.update(user, self.entry(held.entry.state.slot))
        self.num_called += 1

    def batch(self) -> None:
        """Most users are asked about, some act; a few states turn out to be stale while all are in use."""
        for user in dict.fromkeys(self.rng.choices(USERS, cum_weights=ZIPF, k=8)):
            is_asked = self.rng.random() < 0.9
            held = (self.store.take if is_asked else self.store.hold)(user, self.version)
            self.num_called += 1
            if held:
                self.store.bring([held])
                self.num_called += 1
                if self.rng.random() < 0.3:
                    self.grow(user, held)
            elif is_asked:
                self.put(user, self.some_rows())
        if self.rng.random() < 0.2:
            self.store.drop_stale(self.rng.choice(USERS))
            self.num_called += 1
        self.release()

    def release(self) -> None:
        """States go for good when host memory's budget is full, and never for want of a slot within it."""
        num_evicted = self.store.counters.evict
        self.store.release()
        if self.store.counters.evict > num_evicted:
            assert self.store.host_bytes + self.largest_bytes > self.store.host_budget_bytes
        check_bytes(self.store)
        self.num_called += 1

    def between_batches(self) -> None:
        if self.rng.random() < 0.2:
            self.store.forget(self.rng.choice(USERS))
            self.num_called += 1
        if self.rng.random() < 0.05:
            user, rows = self.rng.choice(USERS), self.store.pool.slots.size_for(self.some_rows())
            words_NI = torch.full((rows, self.store.pool.words_NI.shape[1]), self.num_called)
            if self.store.restore(user, self.version, self.entry(self.empty.slot), words_NI, self.rng.random() < 0.5):
                self.written[user] = self.num_called
            self.num_called += 1
        if self.rng.random() < 0.002:
            self.version = self.rng.choice(VERSIONS)
            self.store.serve(self.version)
            self.num_called += 1

    def check_all(self) -> None:
        """Counted anew from who is held: each tier's bytes, that no two have the same memory, and what is written there."""
        of_tier: dict[Tier, list[Slot]] = {Tier.DEVICE: [], Tier.HOST: list(self.store._copied_from.values())}
        for user in USERS:
            if held := self.store._index.find(user):
                assert held.num_bytes == held.entry.state.slot.size * self.layout.row_bytes
                assert (self.store.words(held) == self.written[user]).all()
                of_tier[held.tier].append(held.entry.state.slot)
        for pool, slots in zip((self.store.pool, self.store._host), of_tier.values(), strict=True):
            assert pool is not None
            assert pool.slots.used_units == sum(slot.size for slot in slots)
            spans = sorted((slot.start, slot.start + slot.size) for slot in slots)
            assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize(
    ("device", "num_operations"),
    [
        ("cpu", 100_000),
        pytest.param("cpu", 1_000_000, marks=pytest.mark.slow),
        pytest.param("cuda", 30_000, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="has no GPU")),
    ],
)
def test_a_long_run_of_all_that_happens_loses_no_byte_no_state_and_no_room(device: str, num_operations: int) -> None:
    """Slow: the million; each is some ten microseconds of Python, copies and accounts included."""
    soak = Soak(device)
    store, num_batches = soak.store, 0
    while soak.num_operations < num_operations:
        soak.batch()
        soak.between_batches()
        num_batches += 1
        if num_batches % 500 == 0:
            soak.check_all()
    counters = store.counters
    assert (
        min(counters.promote, counters.demote, counters.evict, counters.stale, counters.forget) > num_operations / 1_000
    )
    device_bytes, host_bytes = store.reserved_bytes
    assert store.budget_bytes < device_bytes < store.budget_bytes + 3 * (BATCH_USERS + 20) * soak.largest_bytes
    assert store.host_budget_bytes < host_bytes < store.host_budget_bytes + 3 * 20 * soak.largest_bytes

    # as many of the largest states as on the first day find room among those of a model that is served no more
    soak.version, num_evicted = StateVersion("m2", "s", "appendable"), counters.evict
    store.serve(soak.version)
    for user in range(NUM_DEVICE + NUM_HOST):
        soak.put(user, soak.largest)
        soak.release()
    soak.check_all()
    assert (len(store), counters.evict) == (NUM_DEVICE + NUM_HOST, num_evicted)
    assert (store.num_bytes, store.host_bytes) == (store.budget_bytes, store.host_budget_bytes)
