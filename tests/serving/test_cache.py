"""The index of states against a naive model: lists of users, who goes first in front."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longer.serving.cache import NEVER_TS, Entry, Held, Known, SegmentedLru, StateIndex, StateVersion, Tier
from longer.serving.fingerprint import EventPrint

USERS = st.integers(0, 7)
VERSIONS = st.sampled_from([StateVersion("m1", "s", "appendable"), StateVersion("m2", "s", "appendable")])
NO_EVENTS = EventPrint(0, 0, np.zeros(1, np.uint64), np.uint64(0))
BUDGET = 100


def entry(state: int = 0, last: int = 10, following: int = NEVER_TS) -> Entry[int]:
    return Entry(state, last, following, Known("t1", 0), NO_EVENTS, False)


class Row:
    """What the naive model knows of one state."""

    def __init__(self, user: int, version: StateVersion, state: int, num_bytes: int, is_protected: bool) -> None:
        self.user, self.version, self.state, self.num_bytes = user, version, state, num_bytes
        self.tier, self.is_protected, self.num_pins = Tier.DEVICE, is_protected, 0


class IndexAgainstLists(RuleBasedStateMachine):
    """`rows` in order of use, the last used at the end: of each tier, those on probation go before the protected ones."""

    def __init__(self) -> None:
        super().__init__()
        self.released: list[int] = []
        self.index: StateIndex[int] = StateIndex(BUDGET, BUDGET, lambda held: self.released.append(held.entry.state))
        self.rows: list[Row] = []
        self.pinned: list[tuple[Held[int], Row]] = []
        self.gone: list[int] = []
        self.serial = self.evict = self.stale = 0

    def row(self, user: int) -> Row | None:
        return next((row for row in self.rows if row.user == user), None)

    def drop(self, row: Row) -> None:
        self.rows.remove(row)
        if not row.num_pins:
            self.gone.append(row.state)

    def protect(self, row: Row) -> None:
        """The last used of the protected ones; the first of them make room, as if they had been used on probation just now."""
        self.rows.remove(row)
        row.is_protected = True
        self.rows.append(row)
        protected = [r for r in self.rows if r.tier == row.tier and r.is_protected]
        while sum(r.num_bytes for r in protected) > 0.8 * BUDGET:
            oldest = protected.pop(0)
            oldest.is_protected = False
            self.rows.remove(oldest)
            self.rows.append(oldest)

    @rule(user=USERS, version=VERSIONS, num_bytes=st.integers(1, 60))
    def put(self, user: int, version: StateVersion, num_bytes: int) -> None:
        self.serial += 1
        old = self.row(user)
        if old:
            self.drop(old)
        self.index.put(user, version, entry(self.serial), num_bytes)
        new = Row(user, version, self.serial, num_bytes, is_protected=False)
        self.rows.append(new)
        if old and old.is_protected:
            self.protect(new)

    @rule(user=USERS, version=VERSIONS, num_bytes=st.integers(1, 60), is_protected=st.booleans())
    def restore(self, user: int, version: StateVersion, num_bytes: int, is_protected: bool) -> None:
        """In host memory, as what goes first of its segment; protected only where there is room for that."""
        if self.row(user):
            return
        self.serial += 1
        protected = [row.num_bytes for row in self.rows if row.tier == Tier.HOST and row.is_protected]
        self.index.restore(user, version, entry(self.serial), num_bytes, is_protected)
        stays = is_protected and sum(protected) + num_bytes <= 0.8 * BUDGET
        row = Row(user, version, self.serial, num_bytes, is_protected=stays)
        row.tier = Tier.HOST
        self.rows.insert(0, row)

    @rule(user=USERS, version=VERSIONS)
    def get(self, user: int, version: StateVersion) -> None:
        row, found = self.row(user), self.index.get(user, version)
        if row and row.version == version:
            assert found is not None
            assert found.entry.state == row.state
            self.protect(row)
        else:
            assert found is None
            if row:
                self.drop(row)
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
        first = min(of_tier, key=lambda row: row.is_protected, default=None)
        victim = self.index.tiers[tier].victim()
        assert (victim and victim.user_key) == (first and first.user)
        if not victim or not first:
            return
        if away:
            self.index.evict(victim)
            self.drop(first)
            self.evict += 1
        else:
            other = Tier(1 - tier)
            self.index.move(victim, other)
            self.rows.remove(first)
            first.tier = other
            self.rows.append(first)
            if first.is_protected:
                self.protect(first)

    @rule(user=USERS)
    def forget(self, user: int) -> None:
        row = self.row(user)
        assert self.index.forget(user) == (row is not None)
        if row:
            self.drop(row)

    @invariant()
    def accounts_are_exact(self) -> None:
        for tier in Tier:
            mine = [row for row in self.rows if row.tier == tier]
            assert self.index.tiers[tier].num_bytes == sum(row.num_bytes for row in mine)
            in_order = [row.user for row in sorted(mine, key=lambda row: row.is_protected)]
            assert [held.user_key for held in self.index.tiers[tier]] == in_order
        assert len(self.index) == len(self.rows)
        assert (self.index.counters.evict, self.index.counters.stale) == (self.evict, self.stale)

    @invariant()
    def memory_is_given_back_once_and_never_while_in_use(self) -> None:
        assert self.released == self.gone


TestIndexAgainstLists = IndexAgainstLists.TestCase


def test_a_scan_of_cold_users_pushes_out_no_user_who_comes_back() -> None:
    tier: SegmentedLru[int] = SegmentedLru(100)
    hot = [Held(user, StateVersion("m", "s", "e"), entry(), 10) for user in range(8)]
    for held in hot:
        tier.add(held)
        tier.touch(held)
    for user in range(1_000):
        tier.add(Held(100 + user, StateVersion("m", "s", "e"), entry(), 10))
        while tier.num_bytes > 100:
            victim = tier.victim()
            assert victim is not None
            tier.remove(victim)
    assert set(hot) <= set(tier)


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
