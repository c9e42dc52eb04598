"""The index of a replica's user states, and the policy of what stays where. What a state is made of is not known here: no torch.

One state a user, on the device or in host memory, within a budget of bytes for each. An entry knows exactly which request times
it answers: with `next_event_ts` the time of the user's first event that the state lacks, it holds all events before `request_ts`
iff `last_event_ts < request_ts <= next_event_ts`. So a hit needs no look at the table.

Who goes first is for `policy` to say; here is who is held, and where. States of a model that is not served (`serve`) go before all
others, and are never moved: nobody can be answered from them.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Generic, NamedTuple, TypeVar

from longer.serving.fingerprint import EventPrint
from longer.serving.policy import Gone, Kept, SegmentedLru, Visits

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
    """A user's state, the request times that it answers, and which events it was made from.

    `holds_table` says that no event of the table is younger than the state, so that what comes next can only be online. By
    `user_id` users are told apart whose ids share a key, and shared out where states outlive the replica.
    """

    state: S
    last_event_ts: int
    next_event_ts: int
    known: Known
    events: EventPrint
    holds_table: bool
    user_id: int | str | None = None

    def answers(self, request_ts: int, known: Known) -> bool:
        """Whether the state holds exactly the events before `request_ts` of all that is known of the user."""
        return self.known == known and self.last_event_ts < request_ts <= self.next_event_ts


@dataclass
class Counters:
    """Since the start. A request is one of hit, append, load, cold; a state that goes unasked is evicted or stale, one that its
    user wants gone is forgotten.

    `demote` and `promote` count moves from the device to host memory and back; a state that is promoted still counts as a hit
    or an append.
    """

    hit: int = 0
    append: int = 0
    load: int = 0
    cold: int = 0
    evict: int = 0
    stale: int = 0
    forget: int = 0
    demote: int = 0
    promote: int = 0

    def count(self, event: str) -> None:
        setattr(self, event, getattr(self, event) + 1)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Tier(IntEnum):
    DEVICE = 0
    HOST = 1


@dataclass(eq=False, kw_only=True)
class Held(Kept, Generic[S]):
    """What the index has of one user."""

    version: StateVersion
    entry: Entry[S]
    tier: Tier = Tier.DEVICE


class StateIndex(Generic[S]):
    """Who is held, where, and who goes next. Not thread-safe.

    The index holds no memory: `release(held)` is called once for each that leaves it, when nobody uses it any more.
    """

    def __init__(
        self,
        device_bytes: int,
        host_bytes: int,
        release: Callable[[Held[S]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tiers: tuple[SegmentedLru[Held[S]], SegmentedLru[Held[S]]] = (
            SegmentedLru(device_bytes),
            SegmentedLru(host_bytes),
        )
        self.counters = Counters()
        self._users: dict[int, Held[S]] = {}
        self._gone = Gone(device_bytes + host_bytes)
        self._visits = Visits(device_bytes + host_bytes, clock)
        self._served: StateVersion | None = None
        self._release = release

    def __len__(self) -> int:
        return len(self._users)

    def serve(self, version: StateVersion) -> None:
        """States of other versions go first from now on; before the first call none does."""
        self._served = version
        for tier in self.tiers:
            tier.sort(self._is_outdated)

    def find(self, user_key: int) -> Held[S] | None:
        """What is held of the user, of whatever version; does not count as a use."""
        return self._users.get(user_key)

    def get(self, user_key: int, version: StateVersion) -> Held[S] | None:
        """What is held of the user, now the most recently used. One of another version is dropped, counted stale, and a miss."""
        held = self._users.get(user_key)
        if held is None:
            return None
        self._visits.ask(held)
        if held.version != version:
            self.drop_stale(user_key)
            return None
        self.tiers[held.tier].touch(held)
        return held

    def put(self, user_key: int, version: StateVersion, entry: Entry[S], num_bytes: int) -> Held[S]:
        """A state on the device in place of what was held of the user, as hot and on the same visit; whose has gone comes back."""
        held = Held(user_key=user_key, version=version, entry=entry, num_bytes=num_bytes)
        was_gone = self._gone.discard(user_key)
        if (old := self._users.get(user_key)) is not None:
            held.asked_again, held.came_at, held.asked_s = old.asked_again, old.came_at, old.asked_s
            self._drop(old)
        else:
            held.asked_again = was_gone
            self._visits.begin(held)
        self._users[user_key] = held
        self.tiers[Tier.DEVICE].add(held, self._is_outdated(held))
        return held

    def restore(self, user_key: int, version: StateVersion, entry: Entry[S], num_bytes: int, asked_again: bool) -> None:
        """A state in host memory of a user of whom nothing is held; it goes before all that are there and as hot. It came in
        elsewhere, long ago: who asks for it comes back."""
        self._gone.discard(user_key)
        held = Held(
            user_key=user_key,
            version=version,
            entry=entry,
            num_bytes=num_bytes,
            asked_again=asked_again,
            tier=Tier.HOST,
        )
        self._users[user_key] = held
        self.tiers[Tier.HOST].add_coldest(held)

    def pin(self, held: Held[S]) -> None:
        held.num_pins += 1

    def unpin(self, held: Held[S]) -> None:
        held.num_pins -= 1
        if not held.num_pins and self._users.get(held.user_key) is not held:
            self._release(held)

    def move(self, held: Held[S], tier: Tier) -> None:
        """It is in another tier from now on, there as hot as it was here; it is not outdated."""
        self.tiers[held.tier].remove(held)
        held.tier = tier
        self.tiers[tier].add(held)
        self.counters.count("demote" if tier == Tier.HOST else "promote")

    def evict(self, held: Held[S]) -> None:
        """Drops what has to go, counted stale if it is outdated; its user's key is remembered for a while."""
        self.counters.count("stale" if self._is_outdated(held) else "evict")
        self._drop(held)
        self._gone.add(held.user_key, held.num_bytes)

    def drop_stale(self, user_key: int) -> None:
        """Drops a user's state because what it was made from is no longer so; the next one is as hot if its user's key is still
        remembered."""
        if (held := self._users.get(user_key)) is not None:
            self.counters.count("stale")
            self._drop(held)
            if held.asked_again:
                self._gone.add(user_key, held.num_bytes)

    def forget(self, user_key: int) -> bool:
        """Drops everything held of a user, wherever it is, and the key; whether anything was held."""
        self._gone.discard(user_key)
        if (held := self._users.get(user_key)) is None:
            return False
        self._drop(held)
        return True

    def clear(self) -> None:
        """Drops all states, counted stale."""
        for user_key in list(self._users):
            self.drop_stale(user_key)

    def _is_outdated(self, held: Held[S]) -> bool:
        return self._served is not None and held.version != self._served

    def _drop(self, held: Held[S]) -> None:
        del self._users[held.user_key]
        self.tiers[held.tier].remove(held)
        if not held.num_pins:
            self._release(held)
