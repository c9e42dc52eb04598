"""From a user and a time to a state that holds exactly the events before it, at the least cost. torch, but no HTTP and no Ray.

Per user, by what the cache holds:

    hit      the state ends there, and nothing is read; or it turns out to, now that the table was looked at
    append   the state ends earlier: the events since are appended; read, unless they can only be online ones
    load     no state, or the time lies before the state's last event: the user is read and encoded; a newer state is kept
    cold     the user has no events before the time: the state of an empty history, not kept for users of whom nothing is known

The sequence table may move to another version, and events may come late: a state then stays only if its own events are the
same in the user's history as it is now.

Three steps, of which only the second waits for the table, and may run in any thread while others are answered:

    classify  takes in the request's events, and tells who can be answered from what is in memory from who needs a row of the table
    read      the row, as one version of the table has it (`HistorySource.read`), without online events
    settle    what is in memory by then, and the row, become the state; a row of a version that is not read any more is asked for
              again. Online events are merged in here, so that none that came meanwhile is missed

`StateResolver.settle` is the first and, for whom it can, the third. It is called again with the rows, and classifies anew, since
the state may have grown or gone while they were read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from longer.arrays import Histories
from longer.errors import UserError
from longer.model.engine import StateEngine
from longer.model.states import UserState, rows_for
from longer.serving.cache import NEVER_TS, Entry, Known, StateVersion, Tier
from longer.serving.fingerprint import EventPrint
from longer.serving.history import HistorySource, TableRow, UserHistory
from longer.serving.online import OnlineEvents
from longer.serving.pending import Pending, read_rows
from longer.serving.requests import Source
from longer.serving.stages import stage
from longer.serving.store import HeldState, StateEntry, StateStore


@dataclass(frozen=True)
class _Update:
    """What brings a user's state to a request's time: `events` after `base`, or a whole window without one."""

    request: Pending
    base: HeldState | None
    events: Histories
    end: int
    history: UserHistory
    keep: bool
    holds_table: bool


class StateResolver:
    """States of users, equal to encoding them from scratch; those worth keeping stay in `store`. Not thread-safe.

    States that requests were given are theirs until `store.release`.
    """

    def __init__(
        self,
        engine: StateEngine,
        version: StateVersion,
        history: HistorySource,
        online: OnlineEvents,
        store: StateStore,
    ) -> None:
        self._engine, self._version = engine, version
        self._history, self._online, self._store = history, online, store

    def resolve(self, wave: Sequence[Pending]) -> None:
        """Gives each request, of different users, its state or its error: the three steps one after another."""
        while unread := self.settle(wave):
            with stage("history"):
                read_rows(self._history, unread)
            wave = unread

    def settle(self, wave: Sequence[Pending]) -> list[Pending]:
        """Gives each request, of different users, its user's state at its time, or its error; those who need a row of the table
        that they do not have yet are left as they are, and returned.

        A request's events are taken in first, once.
        """
        self._take_in(wave)
        hits, in_memory, with_row, unread = [], [], [], []
        for request in wave:
            request.state = None  # one of an attempt that failed is nobody's any more
            held = self._store.take(request.user_key, self._version)
            if held and held.entry.answers(request.request_ts, self._known(request.user_key)):
                hits.append((request, held))
            elif held and self._goes_on_in_memory(request, held):
                in_memory.append((request, held))
            elif request.row and request.row.version_id == self._history.version_id:
                with_row.append((request, request.row, held))
            elif request.error is None:
                unread.append(request)
        self._store.bring(held for _, held in hits)
        for request, held in hits:
            _settle(request, "hit", held.entry.state)
        self._carry_out([*self._from_memory(in_memory), *self._from_table(with_row)])
        return unread

    def add_events(self, wave: Sequence[Pending]) -> None:
        """Takes in the events of different users, and appends them to the states that are here and need no read for it."""
        self._take_in(wave)
        found = [(request, self._store.hold(request.user_key, self._version)) for request in wave]
        due = [(r, h) for r, h in found if h and h.entry.next_event_ts < r.request_ts and self._goes_on_in_memory(r, h)]
        self._carry_out(self._from_memory(due))

    def bring_up_to_date(self, users: Sequence[Pending]) -> None:
        """The held states of these users, whose rows have been read, are as the table has them now; does not count as a use.

        A state that held all that was known is appended to, up to now, unless it lies in host memory, where its next request finds
        it; one that ended earlier stays so, and one that its user's history no longer agrees with goes.
        """
        found = [
            (user, user.row, held)
            for user in users
            if (held := self._store.hold(user.user_key, self._version))
            and held.entry.known != self._known(user.user_key)
            and user.row
            and user.row.version_id == self._history.version_id
        ]
        due = []
        for (user, _, held), history in zip(found, self._histories(found), strict=True):
            entry, end = held.entry, held.entry.state.num_events
            if not history.holds(entry.events):
                self._store.drop_stale(user.user_key)
                continue
            if entry.next_event_ts == NEVER_TS:
                end = max(end, history.end_before(user.request_ts))
            update = _Update(
                user, held, history.events(entry.state.num_events, end), end, history, True, end == history.end_index
            )
            if end == entry.state.num_events:
                self._store.update(user.user_key, self._brought_up_to_date(entry, update))
            elif held.tier == Tier.DEVICE and self._reaches(held, history, end):
                due.append((update, held))
        self._append(due)

    # -- what is known ------------------------------------------------------------------------------------------------

    def _known(self, user_key: int) -> Known:
        return Known(self._history.version_id, self._online.revision(user_key))

    def _take_in(self, wave: Sequence[Pending]) -> None:
        """New events that all come after a state leave it true: it only ends earlier than it did. Others are found out later."""
        self._online.expire(
            [request.user_key for request in wave]
        )  # and at no other moment, or a state's `known` might lie
        sent = [request for request in wave if request.events is not None and not request.is_taken_in]
        if not sent:
            return
        before = {request.user_key: self._known(request.user_key) for request in sent}
        added = self._online.add(pa.concat_tables([request.events for request in sent]))
        for request in sent:
            request.is_taken_in = True
            if (new := added.get(request.user_key)) is None:
                continue
            request.num_new_events = new.num_new
            entry = self._store.peek(request.user_key, self._version)
            was_true = entry is not None and entry.known == before[request.user_key]
            if entry and was_true and new.is_all and entry.last_event_ts < new.first_ts:
                next_ts = min(entry.next_event_ts, new.first_ts)
                updated = replace(entry, known=self._known(request.user_key), next_event_ts=next_ts)
                self._store.update(request.user_key, updated)

    def _goes_on_in_memory(self, request: Pending, held: HeldState) -> bool:
        """Whether all that the user did after the state, up to the request, is known without a look at the table."""
        entry = held.entry
        is_current = entry.known == self._known(request.user_key)
        return is_current and entry.holds_table and entry.last_event_ts < request.request_ts

    # -- how to get there ---------------------------------------------------------------------------------------------

    def _from_memory(self, requests: Sequence[tuple[Pending, HeldState]]) -> list[_Update]:
        if not requests:
            return []
        events = self._online.of([request.user_key for request, _ in requests])
        user_ids = pa.concat_arrays([request.user_id for request, _ in requests])
        first_B = np.array([held.entry.state.num_events for _, held in requests], np.int64)
        last_B = np.array([held.entry.last_event_ts for _, held in requests], np.int64)
        tails = self._history.tails(user_ids, events, first_B, last_B)
        updates = []
        for (request, held), tail in zip(requests, tails, strict=True):
            end = tail.end_before(request.request_ts)
            new = tail.events(held.entry.state.num_events, end)
            updates.append(_Update(request, held, new, end, tail, keep=True, holds_table=True))
        return updates

    def _from_table(self, requests: Sequence[tuple[Pending, TableRow, HeldState | None]]) -> list[_Update]:
        """Updates of the requests that the table's rows can answer; the others have their error."""
        planned = [
            self._plan(request, held, history)
            for (request, _, held), history in zip(requests, self._histories(requests), strict=True)
        ]
        return [update for update in planned if update is not None]

    def _histories(self, requests: Sequence[tuple[Pending, TableRow, HeldState | None]]) -> list[UserHistory]:
        online = self._online.of([request.user_key for request, _, _ in requests])
        user_ids = [request.user_id for request, _, _ in requests]
        return self._history.with_online(user_ids, [row for _, row, _ in requests], online)

    def _plan(self, request: Pending, held: HeldState | None, history: UserHistory) -> _Update | None:
        """How to bring the user's state to the request's time; None, and the request's error, if the table cannot tell."""
        end, windows = history.end_before(request.request_ts), self._engine.model.windows
        if held and held.entry.known != self._known(request.user_key) and not history.holds(held.entry.events):
            self._store.drop_stale(request.user_key)
            held = None
        holds_table = end == history.end_index
        in_the_past = held is not None and request.request_ts <= held.entry.last_event_ts
        if held and not in_the_past and self._reaches(held, history, end):
            events = history.events(held.entry.state.num_events, end)
            return _Update(request, held, events, end, history, keep=True, holds_table=holds_table)
        try:
            window = history.window(end, windows)
        except UserError as error:
            request.error = error
            return None
        keep = not in_the_past and history.num_events > 0
        return _Update(request, None, window, end, history, keep, holds_table)

    def _reaches(self, held: HeldState, history: UserHistory, end: int) -> bool:
        """Whether it can be appended to: it ends where the window before `end` has begun, and what is between is there."""
        windows = self._engine.model.windows
        window_start = windows.history_start(end) * windows.merge_size
        return held.entry.state.num_events >= max(window_start, history.first_index)

    # -- doing it -----------------------------------------------------------------------------------------------------

    def _carry_out(self, updates: Sequence[_Update]) -> None:
        self._encode([update for update in updates if update.base is None])
        with_base = [(update, update.base) for update in updates if update.base is not None]
        self._confirm([(u, base) for u, base in with_base if u.end == base.entry.state.num_events])
        self._append([(u, base) for u, base in with_base if u.end != base.entry.state.num_events])

    def _confirm(self, updates: Sequence[tuple[_Update, HeldState]]) -> None:
        """The states are as they should be; what is known of them is brought up to date."""
        self._store.bring(held for _, held in updates)
        for update, held in updates:
            _settle(update.request, "hit", held.entry.state)
            self._store.update(update.request.user_key, self._brought_up_to_date(held.entry, update))

    def _brought_up_to_date(self, entry: StateEntry, update: _Update) -> StateEntry:
        known, next_ts = self._known(update.request.user_key), update.history.next_ts(update.end)
        return replace(entry, known=known, next_event_ts=next_ts, holds_table=update.holds_table)

    def _encode(self, updates: Sequence[_Update]) -> None:
        if not updates:
            return
        store, histories = self._store, _events(updates)
        slots = store.slots(rows_for(store.layout, histories.end_index_B))
        with stage("encode"):
            states = self._engine.encode(histories, slots)
        for update, state in zip(updates, states, strict=True):
            self._finish(update, "load" if update.end else "cold", state)

    def _append(self, updates: Sequence[tuple[_Update, HeldState]]) -> None:
        """Where a state has outgrown its slot, it gets another; else it grows in place."""
        if not updates:
            return
        store, new = self._store, _events(update for update, _ in updates)
        store.bring(held for _, held in updates)
        bases = [held.entry.state for _, held in updates]
        slots = [
            base.slot if num_rows <= base.slot.size else store.slots([num_rows])[0]
            for base, num_rows in zip(bases, rows_for(store.layout, new.end_index_B), strict=True)
        ]
        try:
            with stage("append"):
                states = self._engine.append(bases, new, slots)
            for (update, _), state in zip(updates, states, strict=True):
                self._finish(update, "append", state)
        except BaseException:
            for update, _ in updates:  # half-written, or longer than what is known of them
                store.drop_stale(update.request.user_key)
            raise

    def _finish(self, update: _Update, source: Source, state: UserState) -> None:
        """Gives the request its state, and the store too unless it has a newer one."""
        request, base = update.request, update.base
        _settle(request, source, state)
        if not update.keep:
            return
        entry = Entry(
            state,
            state.last_event_ts,
            update.history.next_ts(update.end),
            self._known(request.user_key),
            _print(update, state, self._engine.model.windows.stride_events),
            update.holds_table,
            request.user_id[0].as_py(),
        )
        if base is not None and base.entry.state.slot is state.slot:
            self._store.update(request.user_key, entry)
        else:
            self._store.put(request.user_key, self._version, entry)


def _settle(request: Pending, source: Source, state: UserState) -> None:
    request.source, request.state, request.error = source, state, None


def _print(update: _Update, state: UserState, stride_events: int) -> EventPrint:
    """Of the events in the state's window: the base's that are still in it, and the new ones."""
    if update.base is None:
        return EventPrint.of(update.events, stride_events)
    grown = update.base.entry.events.followed_by(update.events, stride_events)
    return grown.from_index(state.first_index, stride_events)


def _events(updates: Iterable[_Update]) -> Histories:
    return Histories.concatenate([update.events for update in updates])
