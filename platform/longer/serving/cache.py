"""The replica's store of user states: index and policy. What a state is made of is not known here, so no torch.

One state a user, least recently used out first, within a budget of bytes. An entry knows exactly which request times it
answers: with `next_event_ts` the time of the user's first event that the state lacks, it holds all events before `request_ts`
iff `last_event_ts < request_ts <= next_event_ts`. So a hit needs no look at the table.
"""

from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

NEVER_TS = 2**63 - 1
"""Stands for 'no event after': the `next_event_ts` of a state that holds all known events of its user."""

S = TypeVar("S")


class StateVersion(NamedTuple):
    """What a state must share with the model that reads it."""

    model_version: str
    schema_hash: str
    encoding: str


class Known(NamedTuple):
    """What a user's history was made from: the table's version, and a number for the set of events sent online."""

    table_version: str
    online_revision: int


@dataclass(frozen=True)
class Entry(Generic[S]):
    """A user's state, the request times that it answers, and the events it was made from.

    `marks_L` identifies each event of the state's window, one number each, oldest first. `holds_table` says that no event of
    the table is younger than the state, so that what comes next can only be online.
    """

    state: S
    num_bytes: int
    last_event_ts: int
    next_event_ts: int
    known: Known
    marks_L: npt.NDArray[np.uint64]
    holds_table: bool

    def answers(self, request_ts: int, known: Known) -> bool:
        """Whether the state holds exactly the events before `request_ts` of all that is known of the user."""
        return self.known == known and self.last_event_ts < request_ts <= self.next_event_ts


@dataclass
class Counters:
    """Since the start. A request is one of hit, append, load, cold; a state that goes unasked is evicted or stale."""

    hit: int = 0
    append: int = 0
    load: int = 0
    cold: int = 0
    evict: int = 0
    stale: int = 0

    def count(self, event: str) -> None:
        setattr(self, event, getattr(self, event) + 1)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class StateCache(Generic[S]):
    """At most `budget_bytes` of states, one a user; `num_bytes` is exactly the sum of its entries'. Not thread-safe."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self.counters = Counters()
        self._entries: OrderedDict[int, tuple[StateVersion, Entry[S]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, user_key: int, version: StateVersion) -> Entry[S] | None:
        """The user's entry, now the most recently used. One of another version is dropped, counted stale, and a miss."""
        found = self._entries.get(user_key)
        if found is None:
            return None
        if found[0] != version:
            self.drop_stale(user_key)
            return None
        self._entries.move_to_end(user_key)
        return found[1]

    def put(self, user_key: int, version: StateVersion, entry: Entry[S]) -> None:
        """Keeps the entry in place of the user's old one, evicting others as needed; one above the whole budget is not kept."""
        self.forget(user_key)
        if entry.num_bytes > self.budget_bytes:
            self.counters.evict += 1
            return
        while self.num_bytes + entry.num_bytes > self.budget_bytes:
            self.forget(next(iter(self._entries)))
            self.counters.evict += 1
        self._entries[user_key] = (version, entry)
        self.num_bytes += entry.num_bytes

    def drop_stale(self, user_key: int) -> None:
        """Drops a user's state because what it was made from is no longer so."""
        self.counters.stale += self.forget(user_key)

    def forget(self, user_key: int) -> bool:
        """Drops everything kept of a user; whether there was anything."""
        found = self._entries.pop(user_key, None)
        if found is None:
            return False
        self.num_bytes -= found[1].num_bytes
        return True
