"""From a user and a time to a state that holds exactly the events before it, at the least cost. torch, but no HTTP and no Ray.

Per user, by what the cache holds:

    hit      the state ends there: nothing is read
    append   the state ends earlier: the events since are appended; read, unless they can only be online ones
    load     no state, or the time lies before the state's last event: the user is read and encoded; a newer state is kept
    cold     the user has no events before the time: the state of an empty history, not kept for users of whom nothing is known

The sequence table may move to another version, and events may come late: a state then stays only if its own events are the
same in the user's history as it is now.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from longer.arrays import Histories
from longer.errors import StorageError, UserError
from longer.model.engine import StateEngine
from longer.model.states import UserState, rows_for
from longer.serving.cache import Entry, Known, StateVersion
from longer.serving.fingerprint import EventPrint
from longer.serving.history import HistorySource, UserHistory
from longer.serving.online import OnlineEvents
from longer.serving.requests import Source
from longer.serving.stages import stage
from longer.serving.store import HeldState, StateStore

_PATIENCE_S = 1.0
"""How long users of a batch that could not be read together are tried one by one."""


@dataclass
class Pending:
    """A request on its way to a state: who, when and the newest events; `source` and `state`, or `error`, when resolved."""

    user_id: pa.Array
    user_key: int
    request_ts: int
    events: pa.Table | None
    num_new_events: int = 0
    source: Source | None = None
    state: UserState | None = None
    error: UserError | None = None


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
        """Gives each request, of different users, its user's state at its time; its events are taken in first."""
        self._take_in(wave)
        hits, in_memory, to_read = [], [], []
        for request in wave:
            held = self._store.take(request.user_key, self._version)
            if held and held.entry.answers(request.request_ts, self._known(request.user_key)):
                hits.append((request, held))
            elif held and self._goes_on_in_memory(request, held):
                in_memory.append((request, held))
            else:
                to_read.append((request, held))
        self._store.bring(held for _, held in hits)
        for request, held in hits:
            _settle(request, "hit", held.entry.state)
        self._carry_out([*self._from_memory(in_memory), *self._from_table(to_read)])

    def add_events(self, wave: Sequence[Pending]) -> None:
        """Takes in the events of different users, and appends them to the states that are here and need no read for it."""
        self._take_in(wave)
        found = [(request, self._store.take_unasked(request.user_key, self._version)) for request in wave]
        due = [(r, h) for r, h in found if h and h.entry.next_event_ts < r.request_ts and self._goes_on_in_memory(r, h)]
        self._carry_out(self._from_memory(due))

    # -- what is known ------------------------------------------------------------------------------------------------

    def _known(self, user_key: int) -> Known:
        return Known(self._history.version_id, self._online.revision(user_key))

    def _take_in(self, wave: Sequence[Pending]) -> None:
        """New events that all come after a state leave it true: it only ends earlier than it did. Others are found out later."""
        self._online.expire(
            [request.user_key for request in wave]
        )  # and at no other moment, or a state's `known` might lie
        sent = [request for request in wave if request.events is not None]
        if not sent:
            return
        before = {request.user_key: self._known(request.user_key) for request in sent}
        added = self._online.add(pa.concat_tables([request.events for request in sent]))
        for request in sent:
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

    def _from_table(self, requests: Sequence[tuple[Pending, HeldState | None]]) -> list[_Update]:
        """Updates of the requests whose users can be read; the others have their error."""
        if not requests:
            return []
        with stage("history"):
            histories = self._read([request for request, _ in requests])
        planned = [
            self._plan(request, held, history)
            for (request, held), history in zip(requests, histories, strict=True)
            if history is not None
        ]
        return [update for update in planned if update is not None]

    def _read(self, requests: Sequence[Pending]) -> list[UserHistory | None]:
        """Each request's user; None, and the request's error, where the table cannot be read: others are not disturbed.

        Damage is soon found. A table that keeps silent is not: once single reads have taken `_PATIENCE_S`, the rest is not tried.
        """
        online = self._online.of([request.user_key for request in requests])
        try:
            return list(self._history.read(pa.concat_arrays([request.user_id for request in requests]), online))
        except StorageError as error:
            together = error
        if len(requests) == 1:
            requests[0].error = together
            return [None]
        histories: list[UserHistory | None] = []
        deadline = time.monotonic() + _PATIENCE_S
        for request in requests:
            if time.monotonic() < deadline:
                histories += self._read([request])
            else:
                request.error = together
                histories.append(None)
        return histories

    def _plan(self, request: Pending, held: HeldState | None, history: UserHistory) -> _Update | None:
        """How to bring the user's state to the request's time; None, and the request's error, if the table cannot tell."""
        end, windows = history.end_before(request.request_ts), self._engine.model.windows
        if held and held.entry.known != self._known(request.user_key) and not history.holds(held.entry.events):
            self._store.drop_stale(request.user_key)
            held = None
        holds_table = end == history.end_index
        in_the_past = held is not None and request.request_ts <= held.entry.last_event_ts
        window_start = windows.history_start(end) * windows.merge_size
        if held and not in_the_past and held.entry.state.num_events >= max(window_start, history.first_index):
            events = history.events(held.entry.state.num_events, end)
            return _Update(request, held, events, end, history, keep=True, holds_table=holds_table)
        try:
            window = history.window(end, windows)
        except UserError as error:
            request.error = error
            return None
        keep = not in_the_past and history.num_events > 0
        return _Update(request, None, window, end, history, keep, holds_table)

    # -- doing it -----------------------------------------------------------------------------------------------------

    def _carry_out(self, updates: Sequence[_Update]) -> None:
        self._encode([update for update in updates if update.base is None])
        self._append([(update, update.base) for update in updates if update.base is not None])

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
    request.source, request.state = source, state


def _print(update: _Update, state: UserState, stride_events: int) -> EventPrint:
    """Of the events in the state's window: the base's that are still in it, and the new ones."""
    if update.base is None:
        return EventPrint.of(update.events, stride_events)
    grown = update.base.entry.events.followed_by(update.events, stride_events)
    return grown.from_index(state.first_index, stride_events)


def _events(updates: Iterable[_Update]) -> Histories:
    return Histories.concatenate([update.events for update in updates])
