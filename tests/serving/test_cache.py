"""The index of states against a naive model: lists of users, who goes first in front."""

import math
from collections.abc import Callable, Iterable
from itertools import accumulate, cycle, takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longer.serving.cache import NEVER_TS, Entry, Held, Known, StateIndex, StateVersion, Tier
from longer.serving.fingerprint import EventPrint

USERS = st.integers(0, 7)
OLD, NEW = StateVersion("m1", "s", "appendable"), StateVersion("m2", "s", "appendable")
VERSIONS = st.sampled_from([OLD, NEW])
NO_EVENTS = EventPrint(0, 0, np.zeros(1, np.uint64), np.uint64(0))
BUDGET = 100
VISIT_BYTES = 2 * BUDGET / 16
OUTDATED, PROBATION, PROTECTED = range(3)


def entry(state: int = 0, last: int = 10, following: int = NEVER_TS) -> Entry[int]:
    return Entry(state, last, following, Known("t1", 0), NO_EVENTS, False)


class Row:
    """What the naive model knows of one state."""

    def __init__(self, user: int, version: StateVersion, state: int, num_bytes: int, asked_again: bool) -> None:
        self.user, self.version, self.state, self.num_bytes = user, version, state, num_bytes
        self.asked_again, self.tier, self.segment, self.num_pins = asked_again, Tier.DEVICE, PROBATION, 0
        self.came_after = 0.0
        """Bytes of what came in or came back since it came in."""
        self.asked_s = -math.inf


class IndexAgainstLists(RuleBasedStateMachine):
    """`rows` in order of use, the last used at the end: of each tier, the segments' in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.released: list[int] = []
        self.now_s = 0.0
        self.index: StateIndex[int] = StateIndex(
            BUDGET, BUDGET, lambda held: self.released.append(held.entry.state), lambda: self.now_s
        )
        self.rows: list[Row] = []
        self.pinned: list[tuple[Held[int], Row]] = []
        self.gone: list[int] = []
        self.remembered: list[tuple[int, int]] = []
        self.served: StateVersion | None = None
        self.serial = self.evict = self.stale = 0

    def row(self, user: int) -> Row | None:
        return next((row for row in self.rows if row.user == user), None)

    def drop(self, row: Row, is_remembered: bool = False) -> None:
        self.rows.remove(row)
        if not row.num_pins:
            self.gone.append(row.state)
        if is_remembered:
            self.remembered.append((row.user, row.num_bytes))
            while sum(num_bytes for _, num_bytes in self.remembered) > 0.8 * 2 * BUDGET:
                self.remembered.pop(0)

    def count_visit(self, visitor: Row) -> None:
        for row in self.rows:
            if row is not visitor:
                row.came_after += visitor.num_bytes

    def come_in(self, row: Row) -> None:
        """The last used of its segment; the first of those that are protected make room, as if used on probation just now."""
        self.rows.append(row)
        row.segment = PROTECTED if row.asked_again else PROBATION
        protected = [r for r in self.rows if (r.tier, r.segment) == (row.tier, PROTECTED)]
        while sum(r.num_bytes for r in protected) > 0.8 * BUDGET:
            oldest = protected.pop(0)
            oldest.segment = PROBATION
            self.rows.remove(oldest)
            self.rows.append(oldest)

    @rule(version=VERSIONS)
    def serve(self, version: StateVersion) -> None:
        """The other versions' states go first; those of this one are as hot as they were."""
        self.served = version
        self.index.serve(version)
        in_order, self.rows = sorted(self.rows, key=lambda row: row.segment), []
        for row in in_order:
            if row.version == version:
                self.come_in(row)
            else:
                row.segment = OUTDATED
                self.rows.append(row)

    @rule(user=USERS, version=VERSIONS, num_bytes=st.integers(1, 60))
    def put(self, user: int, version: StateVersion, num_bytes: int) -> None:
        self.serial += 1
        version, old = self.served or version, self.row(user)
        asked_again = old.asked_again if old else user in [gone for gone, _ in self.remembered]
        self.remembered = [(gone, size) for gone, size in self.remembered if gone != user]
        row = Row(user, version, self.serial, num_bytes, asked_again)
        if old:
            row.came_after, row.asked_s = old.came_after, old.asked_s
            self.drop(old)
        else:
            row.asked_s = self.now_s
            self.count_visit(row)
        self.index.put(user, version, entry(self.serial), num_bytes)
        self.come_in(row)

    @rule(user=USERS, version=VERSIONS, num_bytes=st.integers(1, 60), asked_again=st.booleans())
    def restore(self, user: int, version: StateVersion, num_bytes: int, asked_again: bool) -> None:
        """In host memory, as what goes first of its segment; protected only where there is room for that. Who asks comes back."""
        if self.row(user):
            return
        self.serial += 1
        protected = [row.num_bytes for row in self.rows if (row.tier, row.segment) == (Tier.HOST, PROTECTED)]
        self.index.restore(user, self.served or version, entry(self.serial), num_bytes, asked_again)
        row = Row(user, self.served or version, self.serial, num_bytes, asked_again)
        row.tier, row.came_after = Tier.HOST, float("inf")
        row.segment = PROTECTED if asked_again and sum(protected) + num_bytes <= 0.8 * BUDGET else PROBATION
        self.rows.insert(0, row)
        self.remembered = [(gone, size) for gone, size in self.remembered if gone != user]

    @rule(minutes=st.sampled_from([20, 40]))
    def wait(self, minutes: int) -> None:
        """A visit ends with half an hour in which its user asks nothing."""
        self.now_s += 60 * minutes

    @rule(user=USERS, version=VERSIONS)
    def get(self, user: int, version: StateVersion) -> None:
        version = self.served or version
        row, found = self.row(user), self.index.get(user, version)
        if row:
            is_over = row.came_after > VISIT_BYTES or self.now_s - row.asked_s > 1_800
            row.asked_s = self.now_s
            if is_over and not row.asked_again:
                row.asked_again = True
                self.count_visit(row)
        if row and row.version == version:
            assert found is not None
            assert found.entry.state == row.state
            self.rows.remove(row)
            self.come_in(row)
        else:
            assert found is None
            if row:
                self.drop(row, is_remembered=row.asked_again)
                self.stale += 1

    @rule(user=USERS)
    def pin(self, user: int) -> None:
        row, held = self.row(user), self.index.find(user)
        if row and held:
            self.index.pin(held)
            row.num_pins += 1
            self.pinned.append((held, row))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        held, row = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        row.num_pins -= 1
        self.index.unpin(held)
        if not row.num_pins and row not in self.rows:
            self.gone.append(row.state)

    @rule(tier=st.sampled_from(Tier), away=st.booleans())
    def make_room(self, tier: Tier, away: bool) -> None:
        """Whoever goes first leaves the tier: for the other one, or for good."""
        of_tier = [row for row in self.rows if row.tier == tier and not row.num_pins]
        first = min(of_tier, key=lambda row: row.segment, default=None)
        victim = self.index.tiers[tier].victim()
        assert (victim and victim.user_key) == (first and first.user)
        if not victim or not first:
            return
        assert self.index.tiers[tier].is_outdated(victim) == (first.segment == OUTDATED)
        if away or first.segment == OUTDATED:
            self.index.evict(victim)
            self.drop(first, is_remembered=True)
            self.evict += first.segment != OUTDATED
            self.stale += first.segment == OUTDATED
        else:
            first.tier = Tier(1 - tier)
            self.index.move(victim, first.tier)
            self.rows.remove(first)
            self.come_in(first)

    @rule(user=USERS)
    def forget(self, user: int) -> None:
        row = self.row(user)
        assert self.index.forget(user) == (row is not None)
        self.remembered = [(gone, size) for gone, size in self.remembered if gone != user]
        if row:
            self.drop(row)

    @invariant()
    def accounts_are_exact(self) -> None:
        for tier in Tier:
            mine = [row for row in self.rows if row.tier == tier]
            assert self.index.tiers[tier].num_bytes == sum(row.num_bytes for row in mine)
            current = [row.num_bytes for row in mine if row.segment != OUTDATED]
            assert self.index.tiers[tier].current_bytes == sum(current)
            in_order = [row.user for row in sorted(mine, key=lambda row: row.segment)]
            assert [held.user_key for held in self.index.tiers[tier]] == in_order
        assert len(self.index) == len(self.rows)
        assert (self.index.counters.evict, self.index.counters.stale) == (self.evict, self.stale)

    @invariant()
    def who_went_is_remembered_until_more_has_gone_than_can_be_protected(self) -> None:
        assert [user for user in range(8) if user in self.index._gone] == sorted(user for user, _ in self.remembered)

    @invariant()
    def memory_is_given_back_once_and_never_while_in_use(self) -> None:
        assert self.released == self.gone


TestIndexAgainstLists = IndexAgainstLists.TestCase


class Cache:
    """The index with nothing behind it: who is asked for is there afterwards, and the tiers keep to their budgets."""

    def __init__(self, device_bytes: int, host_bytes: int) -> None:
        self.now_s = 0.0
        self.index: StateIndex[int] = StateIndex(device_bytes, host_bytes, lambda held: None, lambda: self.now_s)
        self.host_bytes, self.version = host_bytes, OLD

    def serve(self, version: StateVersion) -> None:
        self.version = version
        self.index.serve(version)

    def ask(self, user: int, num_bytes: int) -> bool:
        """Whether it is a hit."""
        device, host = self.index.tiers
        held = self.index.get(user, self.version)
        if held is None:
            self.index.put(user, self.version, entry(), num_bytes)
        elif held.tier == Tier.HOST:
            self.index.move(held, Tier.DEVICE)
        while device.num_bytes > device.budget_bytes:
            victim = device.victim()
            assert victim is not None
            if device.is_outdated(victim) or victim.num_bytes > self.host_bytes:
                self.index.evict(victim)
                continue
            while host.num_bytes + victim.num_bytes > self.host_bytes:
                first = host.victim()
                assert first is not None
                self.index.evict(first)
            self.index.move(victim, Tier.HOST)
        return held is not None

    def ask_all(self, users: Iterable[tuple[int, int]]) -> bool:
        """Whether all are hits."""
        return sum(not self.ask(user, num_bytes) for user, num_bytes in users) == 0

    def holds_all(self, users: Iterable[tuple[int, int]]) -> bool:
        return all(self.index.find(user) is not None for user, _ in users)


LARGEST = 12
SIZES = st.integers(1, LARGEST)
TIER_BYTES = st.one_of(st.just(0), st.integers(5 * LARGEST, 150))
"""What is not protected has room for the largest state."""
BUDGETS = st.tuples(TIER_BYTES, TIER_BYTES)
EARLIER = st.lists(st.tuples(st.integers(1_000, 1_020), SIZES), max_size=60)
"""Requests of users who do not come back after."""


def hot_users(sizes: list[int], most_bytes: float) -> list[tuple[int, int]]:
    """As many as fit, of these sizes over and over."""
    ends = accumulate(cycle(sizes))
    return [(user, sizes[user % len(sizes)]) for user, _ in enumerate(takewhile(lambda end: end <= most_bytes, ends))]


def cache_and_hot(
    budgets: tuple[int, int], sizes: list[int], share: Callable[[int], float]
) -> tuple[Cache, list[tuple[int, int]]]:
    """With as many users as fit into so much of both tiers, less the one state that the border between them may cost."""
    device_bytes, host_bytes = budgets
    border_bytes = LARGEST if device_bytes and host_bytes else 0
    return Cache(*budgets), hot_users(sizes, share(device_bytes) + share(host_bytes) - border_bytes)


HOT_SIZES = st.lists(SIZES, min_size=1, max_size=20)


@given(budgets=BUDGETS, sizes=HOT_SIZES, scanned=SIZES)
def test_a_scan_of_cold_users_pushes_out_no_user_who_comes_back(
    budgets: tuple[int, int], sizes: list[int], scanned: int
) -> None:
    """In both tiers together: not only those who are on the device."""
    cache, hot = cache_and_hot(budgets, sizes, lambda tier_bytes: 0.8 * tier_bytes)
    for _ in range(2):
        cache.ask_all(hot)
    for user in range(200):
        cache.ask(10_000 + user, scanned)
    assert cache.holds_all(hot)


def test_a_state_that_moves_to_a_larger_slot_is_on_the_visit_that_it_was_on() -> None:
    cache = Cache(100, 0)
    for num_bytes in (1, 2):
        cache.index.put(0, OLD, entry(), num_bytes)
    held = cache.index.get(0, OLD)
    assert held is not None
    assert not held.asked_again


@pytest.mark.parametrize("num_hot", [1, 3, 6])
def test_a_scan_pushes_out_no_few_users_who_come_every_day_to_a_cache_that_they_have_nearly_alone(num_hot: int) -> None:
    """Nobody else came in while they came, whose states would have told one visit from the next."""
    cache = Cache(100, 0)
    for _ in range(3):
        for user in range(num_hot):
            cache.ask(user, 1)
        cache.now_s += 86_400
    for user in range(200):
        cache.ask(10_000 + user, 1)
    assert cache.holds_all([(user, 1) for user in range(num_hot)])


@given(budgets=BUDGETS, sizes=HOT_SIZES, scanned=SIZES, num_requests=st.integers(2, 5), num_together=st.integers(1, 4))
def test_a_scan_of_users_who_each_ask_twice_leaves_the_hot_ones(
    budgets: tuple[int, int], sizes: list[int], scanned: int, num_requests: int, num_together: int
) -> None:
    """A second page or a retry is no second visit, though others come between."""
    cache, hot = cache_and_hot(budgets, sizes, lambda tier_bytes: 0.8 * tier_bytes)
    for _ in range(2):
        cache.ask_all(hot)
    num_together = min(num_together, int(sum(budgets) / 16 / scanned))
    for first in range(10_000, 10_200, num_together or 1):
        for user in [*range(first, first + num_together)] * num_requests:
            cache.ask(user, scanned)
    assert cache.holds_all(hot)


@given(budgets=BUDGETS.filter(any), size=SIZES, num_requests=st.integers(1, 3), gap=st.floats(0.01, 1))
def test_asking_again_protects_once_more_has_come_than_comes_during_a_visit(
    budgets: tuple[int, int], size: int, num_requests: int, gap: float
) -> None:
    """However often, and wherever the state lies; the requests of those who came between make no difference."""
    cache = Cache(*budgets)
    cache.ask(0, size)
    num_others = 0
    while num_others + 1 <= gap * sum(budgets) / 10 and cache.index.find(0):
        num_others += 1
        for _ in range(num_requests):
            cache.ask(num_others, 1)
    if cache.ask(0, size):
        held = cache.index.find(0)
        assert held
        assert held.asked_again == (num_others > sum(budgets) / 16)


def test_a_state_that_grows_into_another_is_of_the_same_visit() -> None:
    """Or an event between two requests, or each one that comes, would begin the visit anew, and nobody who acts came back."""
    cache = Cache(100, 0)
    cache.ask(0, 10)
    for others in range(3):
        cache.ask_all((10 * others + user, 1) for user in range(1, 6))
        cache.index.put(0, OLD, entry(), 12)
    cache.ask(0, 12)
    held = cache.index.find(0)
    assert held
    assert held.asked_again


def test_a_second_request_that_finds_its_state_stale_is_none_of_another_visit() -> None:
    """A late event between two pages, or a roll-out: what is made anew is as hot as what was dropped."""
    cache = Cache(160, 0)
    for visitor, num_others in ((0, 9), (100, 11)):
        cache.ask(visitor, 1)
        cache.ask_all((visitor + 1 + other, 1) for other in range(num_others))
        cache.ask(visitor, 1)
        cache.index.drop_stale(visitor)
        cache.ask(visitor, 1)
        held = cache.index.find(visitor)
        assert held
        assert held.asked_again == (num_others > 10)


def test_who_asks_for_what_a_replica_before_has_left_has_come_back() -> None:
    cache = Cache(100, 100)
    cache.index.restore(0, OLD, entry(), 10, asked_again=False)
    cache.ask(0, 10)
    held = cache.index.find(0)
    assert held
    assert held.asked_again


@given(budgets=BUDGETS, earlier=EARLIER, sizes=HOT_SIZES)
def test_users_who_were_hot_once_do_not_keep_out_those_who_are_now(
    budgets: tuple[int, int], earlier: list[tuple[int, int]], sizes: list[int]
) -> None:
    """Whatever was protected before, whoever keeps coming back is there from the third round on, and stays in a scan."""
    cache, hot = cache_and_hot(budgets, sizes, lambda tier_bytes: 0.8 * tier_bytes)
    cache.ask_all(earlier * 3)
    for _ in range(2):
        cache.ask_all(hot)
    assert cache.ask_all(hot)
    for user in range(200):
        cache.ask(10_000 + user, LARGEST)
    assert cache.ask_all(hot)


@given(budgets=BUDGETS, earlier=EARLIER, sizes=HOT_SIZES)
def test_states_of_a_model_that_is_not_served_take_no_room_from_those_of_the_one_that_is(
    budgets: tuple[int, int], earlier: list[tuple[int, int]], sizes: list[int]
) -> None:
    cache, hot = cache_and_hot(budgets, sizes, lambda tier_bytes: tier_bytes)
    cache.ask_all(earlier * 3)
    cache.serve(NEW)
    cache.ask_all(hot)
    assert cache.ask_all(hot)


def test_a_model_that_is_taken_back_finds_its_states_as_hot_as_they_were() -> None:
    cache, hot = Cache(50, 50), [(user, 10) for user in range(8)]
    for _ in range(2):
        cache.ask_all(hot)
    cache.serve(NEW)
    assert not cache.ask(100, 10)
    cache.serve(OLD)
    for user in range(200, 300):
        cache.ask(user, 10)
    assert sum(cache.ask(user, 10) for user, _ in hot) == 7


def test_a_state_never_answers_a_time_whose_events_it_lacks_or_foresees() -> None:
    held = entry(last=10, following=20)
    assert [ts for ts in range(9, 23) if held.answers(ts, Known("t1", 0))] == list(range(11, 21))
    assert not held.answers(15, Known("t2", 0))
    assert not held.answers(15, Known("t1", 1))


def test_the_index_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, longer.serving.cache, longer.slots; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
