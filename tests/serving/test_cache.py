"""The state store against a naive model: a list of (user, version, bytes), oldest use first."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from longer.serving.cache import NEVER_TS, Entry, Known, StateCache, StateVersion

USERS = st.integers(0, 5)
VERSIONS = st.sampled_from([StateVersion("m1", "s", "appendable"), StateVersion("m2", "s", "appendable")])


def entry(num_bytes: int, state: int = 0, last: int = 10, following: int = NEVER_TS) -> Entry[int]:
    return Entry(state, num_bytes, last, following, Known("t1", 0), np.zeros(0, np.uint64), False)


class CacheAgainstList(RuleBasedStateMachine):
    BUDGET = 100

    def __init__(self) -> None:
        super().__init__()
        self.cache: StateCache[int] = StateCache(self.BUDGET)
        self.rows: list[tuple[int, StateVersion, Entry[int]]] = []
        self.evict = self.stale = self.serial = 0

    @rule(user=USERS, version=VERSIONS, num_bytes=st.integers(0, 120))
    def put(self, user: int, version: StateVersion, num_bytes: int) -> None:
        self.serial += 1
        new = entry(num_bytes, self.serial)
        self.cache.put(user, version, new)
        self.rows = [row for row in self.rows if row[0] != user] + [(user, version, new)]
        if num_bytes > self.BUDGET:
            self.rows.pop()
            self.evict += 1
        while sum(row[2].num_bytes for row in self.rows) > self.BUDGET:
            self.rows.pop(0)
            self.evict += 1

    @rule(user=USERS, version=VERSIONS)
    def get(self, user: int, version: StateVersion) -> None:
        mine = [row for row in self.rows if row[0] == user]
        found = self.cache.get(user, version)
        if mine:
            self.rows.remove(mine[0])
        if mine and mine[0][1] == version:
            self.rows.append(mine[0])
            assert found is mine[0][2]
        else:
            self.stale += len(mine)
            assert found is None

    @rule(user=USERS)
    def forget(self, user: int) -> None:
        kept = [row for row in self.rows if row[0] != user]
        assert self.cache.forget(user) == (len(kept) < len(self.rows))
        self.rows = kept

    @invariant()
    def accounts_are_exact(self) -> None:
        assert self.cache.num_bytes == sum(row[2].num_bytes for row in self.rows) <= self.BUDGET
        assert len(self.cache) == len(self.rows)
        assert (self.cache.counters.evict, self.cache.counters.stale) == (self.evict, self.stale)


TestCacheAgainstList = CacheAgainstList.TestCase


def test_a_state_never_answers_a_time_whose_events_it_lacks_or_foresees() -> None:
    held = entry(1, last=10, following=20)
    assert [ts for ts in range(9, 23) if held.answers(ts, Known("t1", 0))] == list(range(11, 21))
    assert not held.answers(15, Known("t2", 0))
    assert not held.answers(15, Known("t1", 1))


def test_the_index_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, longer.serving.cache; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
