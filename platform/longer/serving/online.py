"""Events that were sent to this replica and that the sequence table may not have yet: in memory, within bounds. No torch, no Ray.

The same event is the same in every column of the log. It may be sent again: of copies, the most that one call, or the table,
holds at once are counted. So a call may be repeated, calls may come in any order, and events may be kept after the table has
caught up, all without counting one twice; and those of a replica that has stopped may be taken in, as old as they are (`restore`).
"""

import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longer.data.columns import milliseconds, single_array
from longer.hashing import stable_keys
from longer.schema import EventSchema

_RECEIVED_S = "received_s"
"""Since 1970: what is kept may outlive the machine."""
_USER_BYTES = 8_700
"""Memory of a user's Python and Arrow objects besides the values, as measured over thousands of users of two events."""


@dataclass(frozen=True)
class EventLimits:
    """What is kept. A user's events that arrived first go first; users who sent last stay longest."""

    max_user_events: int = 1_000
    keep_s: float = 172_800
    max_bytes: int = 128 << 20


@dataclass
class EventCounters:
    """Since the start: events received, how many of them were known, kept ones that went for a bound or for their age, and those of
    replicas that have stopped, taken in."""

    received: int = 0
    known: int = 0
    dropped: int = 0
    expired: int = 0
    restored: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Added:
    """What a call added of one user: how many events, and the earliest one's time; `is_all` if none had to go in the same call."""

    num_new: int
    first_ts: int
    is_all: bool


@dataclass(frozen=True)
class _Held:
    """One user's events in order of arrival; another `revision` means other events."""

    events: pa.Table
    revision: int
    num_bytes: int
    user_id: int | str

    @staticmethod
    def of(events: pa.Table, revision: int) -> "_Held":
        """Copied, so that nothing else is held on to."""
        if events.column(0).num_chunks == 1:  # maybe a part of another table
            events = events.take(pa.array(np.arange(len(events))))
        events = events.combine_chunks()
        return _Held(events, revision, events.nbytes + _USER_BYTES, events["user_id"][0].as_py())

    @property
    def oldest_s(self) -> float:
        return self.events[_RECEIVED_S][0].as_py()


class OnlineEvents:
    """At most `limits` of events. Not thread-safe."""

    def __init__(self, schema: EventSchema, limits: EventLimits) -> None:
        self._schema, self._limits = schema, limits
        self._names = ["user_id", *(field.name for field in schema.event_fields())]
        self._users: OrderedDict[int, _Held] = OrderedDict()
        self._revisions = count(1)
        self.counters = EventCounters()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._users)

    def revision(self, user_key: int) -> int:
        """A number that two moments share only if the user's events were the same; 0 if there are none."""
        held = self._users.get(user_key)
        return held.revision if held else 0

    def of(self, user_keys: list[int]) -> pa.Table:
        """All events of these users, in no stated order (`events_arrow`)."""
        held = [found.events.select(self._names) for key in user_keys if (found := self._users.get(key))]
        # In one piece: what is done with it next costs a call for each piece of each column.
        return pa.concat_tables([self._schema.events_arrow().empty_table(), *held]).combine_chunks()

    def add(self, events: pa.Table) -> dict[int, Added]:
        """Takes in events (`events_arrow`) of any users; by user key, what was new."""
        user_keys = np.unique(stable_keys(events["user_id"])).tolist()
        before = {key: len(held.events) for key in user_keys if (held := self._users.get(key))}
        new = beyond(events, self.of(user_keys), self._schema)
        self.counters.received += len(events)
        self.counters.known += len(events) - len(new)
        key_E = stable_keys(new["user_id"])
        order_E = np.argsort(key_E, kind="stable")
        arrived = new.take(pa.array(order_E)).append_column(_RECEIVED_S, pa.repeat(time.time(), len(new)))
        time_E = milliseconds(single_array(arrived["event_ts"]))
        found_U, start_U, num_U = np.unique(key_E[order_E], return_index=True, return_counts=True)
        added = {}
        for key, start, num in zip(found_U.tolist(), start_U.tolist(), num_U.tolist(), strict=True):
            held, of_user = self._users.get(key), arrived.slice(start, num)
            self._hold(key, pa.concat_tables([held.events, of_user]) if held else of_user)
            self._fit()
            added[key] = num, int(time_E[start : start + num].min())
        return {
            key: Added(num, first_ts, self._num_held(key) == before.get(key, 0) + num)
            for key, (num, first_ts) in added.items()
        }

    def all(self) -> pa.Table:
        """The events of all users with when they came, for `restore`: a user's together, those of who sent last first."""
        empty = self._schema.events_arrow().empty_table().append_column(_RECEIVED_S, pa.array([], pa.float64()))
        return pa.concat_tables([empty, *(held.events for held in reversed(self._users.values()))])

    def restore(self, kept: pa.Table) -> dict[int, int]:
        """Takes in some users' events as `all` of another replica gave them; the `revision` of those of whom exactly these are held
        from here on. Of too many events of a user those stay that arrived last, wherever; what all users' bound has no room for is
        left out, and users who are new here are the first to go later. To take in the same again changes nothing."""
        key_E, from_s, exactly = stable_keys(kept["user_id"]), time.time() - self._limits.keep_s, dict[int, int]()
        for user_key in dict.fromkeys(key_E.tolist()):
            sent = kept.filter(pa.array(key_E == user_key))
            if not self.is_free(user_key, sent["user_id"][0].as_py()):
                continue  # who is known here stays
            young = sent.filter(pc.greater(sent[_RECEIVED_S], from_s))
            num_before = self._num_held(user_key)
            num_new = self._restore_user(user_key, young)
            if len(sent) == len(young) == num_before + num_new == self._num_held(user_key):
                exactly[user_key] = self.revision(user_key)
        return exactly

    def _restore_user(self, user_key: int, young: pa.Table) -> int:
        """How many of the events were not here, whether or not there was room for them."""
        held = self._users.get(user_key)
        new = beyond(young, self.of([user_key]), self._schema) if held else young
        new = new.sort_by([(_RECEIVED_S, "ascending"), ("event_ts", "ascending")])
        together = pa.concat_tables([new, held.events]) if held else new
        received_s = together[_RECEIVED_S].to_numpy()
        last = np.argsort(received_s, kind="stable")[-self._limits.max_user_events :]  # held ones, of equally old ones
        num_taken = int(np.count_nonzero(last < len(new)))
        if num_taken:
            restored = _Held.of(together.take(pa.array(last)), next(self._revisions))
            if self.num_bytes + restored.num_bytes - (held.num_bytes if held else 0) <= self._limits.max_bytes:
                self._keep(user_key, restored)
                if held is None:
                    self._users.move_to_end(user_key, last=False)
                self.counters.restored += num_taken
                self.counters.dropped += len(together) - len(new) - (len(last) - num_taken)
        return len(new)

    def expire(self, user_keys: list[int]) -> None:
        """Drops what is too old of these users."""
        from_s = time.time() - self._limits.keep_s
        for key in user_keys:
            held = self._users.get(key)
            if held and held.oldest_s <= from_s:
                young = held.events.filter(pc.greater(held.events[_RECEIVED_S], from_s))
                self.counters.expired += len(held.events) - len(young)
                self._put(key, young)

    def forget(self, user_key: int) -> bool:
        """Drops everything of a user; whether there was anything."""
        held = self._users.pop(user_key, None)
        if held is None:
            return False
        self.num_bytes -= held.num_bytes
        return True

    def is_free(self, user_key: int, user_id: int | str) -> bool:
        """Whether nothing is held that another user of the same key has sent."""
        held = self._users.get(user_key)
        return held is None or held.user_id == user_id

    def forget_others(self, user_key: int, user_id: int | str) -> None:
        """Drops what another user of the same key has sent."""
        if not self.is_free(user_key, user_id):
            self.counters.dropped += self._num_held(user_key)
            self.forget(user_key)

    def _num_held(self, user_key: int) -> int:
        held = self._users.get(user_key)
        return len(held.events) if held else 0

    def _hold(self, user_key: int, events: pa.Table) -> None:
        """Another set of the user's events, in order of arrival, within the bound for a user."""
        excess = 0
        if len(events) > self._limits.max_user_events:  # a quarter at once: each time costs a look at the table
            excess = len(events) - max(1, self._limits.max_user_events * 3 // 4)
        self._put(user_key, events.slice(excess))
        self.counters.dropped += excess

    def _fit(self) -> None:
        """Who sent last stays, within the bound for all."""
        while self.num_bytes > self._limits.max_bytes:
            first = next(iter(self._users))
            self.counters.dropped += self._num_held(first)
            self.forget(first)

    def _put(self, user_key: int, events: pa.Table) -> None:
        """Another set of events."""
        if len(events):
            self._keep(user_key, _Held.of(events, next(self._revisions)))
        else:
            self.forget(user_key)

    def _keep(self, user_key: int, held: _Held) -> None:
        self.forget(user_key)
        self._users[user_key] = held
        self.num_bytes += held.num_bytes


def beyond(events: pa.Table, known: pa.Table, schema: EventSchema) -> pa.Table:
    """The events that `known` does not hold, as multisets, in no stated order: of one that it holds less often, the difference.

    Both have the columns of `events_arrow`, and may have several users. When they were received is kept where `events` tell it: of
    equal ones, when the last one was.
    """
    names = schema.events_arrow().names
    kept = [_RECEIVED_S] if _RECEIVED_S in events.column_names else []
    same_time = known.filter(pc.is_in(known["event_ts"], single_array(events["event_ts"])))
    if not len(same_time) and not kept:  # as nearly always, and counting takes most of the time
        return _positive_zeros(events.select(names)).combine_chunks()
    theirs = same_time.select(names)
    for name in kept:
        theirs = theirs.append_column(name, pa.nulls(len(theirs), pa.float64()))
    sides = [_counted(theirs, known=1, sent=0), _counted(events.select(names + kept), known=0, sent=1)]
    sums = [("known", "sum"), ("sent", "sum"), *((name, "max") for name in kept)]
    counts = pa.concat_tables(sides).group_by(names).aggregate(sums)
    missing = counts["sent_sum"].to_numpy() - counts["known_sum"].to_numpy()
    rows = np.repeat(np.arange(len(counts)), np.maximum(missing, 0))
    found = counts.select([*names, *(f"{name}_max" for name in kept)]).rename_columns(names + kept)
    return found.take(pa.array(rows)).combine_chunks()


def _counted(events: pa.Table, known: int, sent: int) -> pa.Table:
    """The events with how often each is on which side."""
    ones = {"known": np.full(len(events), known), "sent": np.full(len(events), sent)}
    events = _positive_zeros(events)
    for name, values in ones.items():
        events = events.append_column(name, pa.array(values))
    return events


def _positive_zeros(events: pa.Table) -> pa.Table:
    """-0.0 is 0.0, which sorts and scores the same."""
    columns = {
        name: pc.add(column, pa.scalar(0, column.type)) if pa.types.is_floating(column.type) else column
        for name, column in zip(events.column_names, events.columns, strict=True)
    }
    return pa.table(columns)
