"""The index of a replica's user states, and the policy of what stays where. What a state is made of is not known here: no torch.

One state a user, on the device or in host memory, within a budget of bytes for each. An entry knows exactly which request times
it answers: with `next_event_ts` the time of the user's first event that the state lacks, it holds all events before `request_ts`
iff `last_event_ts < request_ts <= next_event_ts`. So a hit needs no look at the table.

Each tier is a segmented LRU (Karedla, Love and Wherry, "Caching strategies to improve disk system performance", IEEE Computer,
1994): a state comes in on probation, and is protected when it is asked for again; what is on probation goes first. So a scan of
users who are asked about once pushes out each other, never those who come back, who have up to four fifths of the tier.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Generic, NamedTuple, TypeVar

from longer.serving.fingerprint import EventPrint

NEVER_TS = 2**63 - 1
"""Stands for 'no event after': the `next_event_ts` of a state that holds all known events of its user."""

_PROTECTED_SHARE = 0.8

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

    `holds_table` says that no event of the table is younger than the state, so that what comes next can only be online. `user_id`
    is told where states may outlive the replica, whose successors share users out by it.
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


@dataclass(eq=False)
class Held(Generic[S]):
    """What the index has of one user. `num_pins` counts who uses the state just now: a pinned one is no victim."""

    user_key: int
    version: StateVersion
    entry: Entry[S]
    num_bytes: int
    tier: Tier = Tier.DEVICE
    num_pins: int = 0


class SegmentedLru(Generic[S]):
    """Order of use within one tier of `budget_bytes`. `num_bytes` is exactly the sum of what is in it."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.num_bytes = self._protected_bytes = 0
        self._probation: OrderedDict[int, Held[S]] = OrderedDict()
        self._protected: OrderedDict[int, Held[S]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def __iter__(self) -> Iterator[Held[S]]:
        """In the order in which they would go."""
        yield from self._probation.values()
        yield from self._protected.values()

    def is_protected(self, held: Held[S]) -> bool:
        return held.user_key in self._protected

    def add(self, held: Held[S], is_protected: bool = False) -> None:
        self.num_bytes += held.num_bytes
        if is_protected:
            self._protect(held)
        else:
            self._probation[held.user_key] = held

    def add_coldest(self, held: Held[S], is_protected: bool) -> None:
        """It goes before all others of its segment."""
        self.num_bytes += held.num_bytes
        is_protected &= self._protected_bytes + held.num_bytes <= _PROTECTED_SHARE * self.budget_bytes
        segment = self._protected if is_protected else self._probation
        segment[held.user_key] = held
        segment.move_to_end(held.user_key, last=False)
        self._protected_bytes += held.num_bytes * is_protected

    def remove(self, held: Held[S]) -> bool:
        """Takes it out; whether it was protected."""
        self.num_bytes -= held.num_bytes
        if self._probation.pop(held.user_key, None) is not None:
            return False
        del self._protected[held.user_key]
        self._protected_bytes -= held.num_bytes
        return True

    def touch(self, held: Held[S]) -> None:
        """It was asked for again."""
        if self._probation.pop(held.user_key, None) is not None:
            self._protect(held)
        else:
            self._protected.move_to_end(held.user_key)

    def victim(self) -> Held[S] | None:
        """Who goes first of those who are not in use."""
        return next((held for held in self if not held.num_pins), None)

    def _protect(self, held: Held[S]) -> None:
        self._protected[held.user_key] = held
        self._protected_bytes += held.num_bytes
        while self._protected_bytes > _PROTECTED_SHARE * self.budget_bytes:
            key, oldest = self._protected.popitem(last=False)
            self._protected_bytes -= oldest.num_bytes
            self._probation[key] = oldest


class StateIndex(Generic[S]):
    """Who is held, where, and who goes next. Not thread-safe.

    The index holds no memory: `release(held)` is called once for each that leaves it, when nobody uses it any more.
    """

    def __init__(self, device_bytes: int, host_bytes: int, release: Callable[[Held[S]], None]) -> None:
        self.tiers: tuple[SegmentedLru[S], SegmentedLru[S]] = SegmentedLru(device_bytes), SegmentedLru(host_bytes)
        self.counters = Counters()
        self._users: dict[int, Held[S]] = {}
        self._release = release

    def __len__(self) -> int:
        return len(self._users)

    def find(self, user_key: int) -> Held[S] | None:
        """What is held of the user, of whatever version; does not count as a use."""
        return self._users.get(user_key)

    def get(self, user_key: int, version: StateVersion) -> Held[S] | None:
        """What is held of the user, now the most recently used. One of another version is dropped, counted stale, and a miss."""
        held = self._users.get(user_key)
        if held is None:
            return None
        if held.version != version:
            self.drop_stale(user_key)
            return None
        self.tiers[held.tier].touch(held)
        return held

    def put(self, user_key: int, version: StateVersion, entry: Entry[S], num_bytes: int) -> Held[S]:
        """A state on the device in place of what was held of the user, and as protected as that was."""
        old, is_protected = self._users.pop(user_key, None), False
        if old is not None:
            is_protected = self.tiers[old.tier].remove(old)
            self._gone(old)
        held = Held(user_key, version, entry, num_bytes)
        self._users[user_key] = held
        self.tiers[Tier.DEVICE].add(held, is_protected)
        return held

    def restore(
        self, user_key: int, version: StateVersion, entry: Entry[S], num_bytes: int, is_protected: bool
    ) -> None:
        """A state in host memory of a user of whom nothing is held; it goes before all that are there and as protected."""
        held = Held(user_key, version, entry, num_bytes, Tier.HOST)
        self._users[user_key] = held
        self.tiers[Tier.HOST].add_coldest(held, is_protected)

    def pin(self, held: Held[S]) -> None:
        held.num_pins += 1

    def unpin(self, held: Held[S]) -> None:
        held.num_pins -= 1
        if not held.num_pins and self._users.get(held.user_key) is not held:
            self._release(held)

    def move(self, held: Held[S], tier: Tier) -> None:
        """It is in another tier from now on, there as protected as it was here."""
        is_protected = self.tiers[held.tier].remove(held)
        held.tier = tier
        self.tiers[tier].add(held, is_protected)
        self.counters.count("demote" if tier == Tier.HOST else "promote")

    def evict(self, held: Held[S]) -> None:
        self.counters.evict += self.forget(held.user_key)

    def drop_stale(self, user_key: int) -> None:
        """Drops a user's state because what it was made from is no longer so."""
        self.counters.stale += self.forget(user_key)

    def forget(self, user_key: int) -> bool:
        """Drops everything held of a user, wherever it is; whether there was anything."""
        held = self._users.pop(user_key, None)
        if held is None:
            return False
        self.tiers[held.tier].remove(held)
        self._gone(held)
        return True

    def clear(self) -> None:
        """Drops all states, counted stale."""
        for user_key in list(self._users):
            self.drop_stale(user_key)

    def _gone(self, held: Held[S]) -> None:
        if not held.num_pins:
            self._release(held)
