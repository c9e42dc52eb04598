"""From a user and a time to a state that holds exactly the events before it, at the least cost. torch, but no HTTP and no Ray.

Per user, by what the cache holds:

    hit      the state ends there: nothing is read
    append   the state ends earlier: the events since are appended; read, unless they can only be online ones
    load     no state, or the time lies before the state's last event: the user is read and encoded; a newer state is kept
    cold     the user has no events before the time: the state of an empty history, not kept for users of whom nothing is known

The sequence table may move to another version, and events may come late: a state then stays only if its own events are the
same in the user's history as it is now.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from longer.arrays import Histories
from longer.errors import StorageError, UserError
from longer.model.longer import Longer
from longer.model.states import UserState, append, encode
from longer.serving.cache import Entry, Known, StateCache, StateVersion
from longer.serving.history import HistorySource, UserHistory
from longer.serving.online import OnlineEvents
from longer.serving.requests import Source
from longer.serving.stages import stage

UserEntry = Entry[UserState]


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
    base: UserEntry | None
    events: Histories
    end: int
    history: UserHistory
    keep: bool
    holds_table: bool


class StateResolver:
    """States of users, equal to encoding them from scratch; those worth keeping go to `cache`. Not thread-safe."""

    def __init__(
        self,
        model: Longer,
        version: StateVersion,
        history: HistorySource,
        online: OnlineEvents,
        cache: StateCache[UserState],
    ) -> None:
        self._model, self._version = model, version
        self._history, self._online, self._cache = history, online, cache

    def resolve(self, wave: Sequence[Pending]) -> None:
        """Gives each request, of different users, its user's state at its time; its events are taken in first."""
        self._take_in(wave)
        in_memory, to_read = [], []
        for request in wave:
            entry = self._cache.get(request.user_key, self._version)
            if entry and entry.answers(request.request_ts, self._known(request.user_key)):
                _settle(request, "hit", entry.state)
            elif entry and self._goes_on_in_memory(request, entry):
                in_memory.append((request, entry))
            else:
                to_read.append((request, entry))
        self._carry_out([*self._from_memory(in_memory), *self._from_table(to_read)])

    def add_events(self, wave: Sequence[Pending]) -> None:
        """Takes in the events of different users, and appends them to the states that are here and need no read for it."""
        self._take_in(wave)
        found = [(request, self._cache.get(request.user_key, self._version)) for request in wave]
        due = [(r, e) for r, e in found if e and e.next_event_ts < r.request_ts and self._goes_on_in_memory(r, e)]
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
            entry = self._cache.get(request.user_key, self._version)
            was_true = entry is not None and entry.known == before[request.user_key]
            if entry and was_true and new.is_all and entry.last_event_ts < new.first_ts:
                next_ts = min(entry.next_event_ts, new.first_ts)
                updated = replace(entry, known=self._known(request.user_key), next_event_ts=next_ts)
                self._cache.put(request.user_key, self._version, updated)

    def _goes_on_in_memory(self, request: Pending, entry: UserEntry) -> bool:
        """Whether all that the user did after the state, up to the request, is known without a look at the table."""
        is_current = entry.known == self._known(request.user_key)
        return is_current and entry.holds_table and entry.last_event_ts < request.request_ts

    # -- how to get there ---------------------------------------------------------------------------------------------

    def _from_memory(self, requests: Sequence[tuple[Pending, UserEntry]]) -> list[_Update]:
        if not requests:
            return []
        events = self._online.of([request.user_key for request, _ in requests])
        user_ids = pa.concat_arrays([request.user_id for request, _ in requests])
        first_B = np.array([entry.state.num_events for _, entry in requests], np.int64)
        last_B = np.array([entry.last_event_ts for _, entry in requests], np.int64)
        tails = self._history.tails(user_ids, events, first_B, last_B)
        updates = []
        for (request, entry), tail in zip(requests, tails, strict=True):
            end = tail.end_before(request.request_ts)
            new = tail.events(entry.state.num_events, end)
            updates.append(_Update(request, entry, new, end, tail, keep=True, holds_table=True))
        return updates

    def _from_table(self, requests: Sequence[tuple[Pending, UserEntry | None]]) -> list[_Update]:
        """Updates of the requests whose users can be read; the others have their error."""
        if not requests:
            return []
        with stage("history"):
            histories = self._read([request for request, _ in requests])
        planned = [
            self._plan(request, entry, history)
            for (request, entry), history in zip(requests, histories, strict=True)
            if history is not None
        ]
        return [update for update in planned if update is not None]

    def _read(self, requests: Sequence[Pending]) -> list[UserHistory | None]:
        """Each request's user; None, and the request's error, where the table cannot be read: others are not disturbed."""
        online = self._online.of([request.user_key for request in requests])
        try:
            return list(self._history.read(pa.concat_arrays([request.user_id for request in requests]), online))
        except StorageError as error:
            if len(requests) == 1:
                requests[0].error = error
                return [None]
        return [self._read([request])[0] for request in requests]

    def _plan(self, request: Pending, entry: UserEntry | None, history: UserHistory) -> _Update | None:
        """How to bring the user's state to the request's time; None, and the request's error, if the table cannot tell."""
        end, windows = history.end_before(request.request_ts), self._model.windows
        if entry and entry.known != self._known(request.user_key) and not _still_true(entry, history):
            self._cache.drop_stale(request.user_key)
            entry = None
        holds_table = end == history.end_index
        in_the_past = entry is not None and request.request_ts <= entry.last_event_ts
        window_start = windows.history_start(end) * windows.merge_size
        if entry and not in_the_past and entry.state.num_events >= max(window_start, history.first_index):
            events = history.events(entry.state.num_events, end)
            return _Update(request, entry, events, end, history, keep=True, holds_table=holds_table)
        try:
            window = history.window(end, windows)
        except UserError as error:
            request.error = error
            return None
        keep = not in_the_past and history.num_events > 0
        return _Update(request, None, window, end, history, keep, holds_table)

    # -- doing it -----------------------------------------------------------------------------------------------------

    def _carry_out(self, updates: Sequence[_Update]) -> None:
        whole = [update for update in updates if update.base is None]
        grown = [(update, update.base.state) for update in updates if update.base is not None]
        if whole:
            with stage("encode"):
                encoded = encode(self._model, _events(whole))
            for update, state in zip(whole, encoded, strict=True):
                self._finish(update, "load" if update.end else "cold", state)
        if grown:
            bases = [base for _, base in grown]
            with stage("append"):
                states = append(self._model, bases, _events(update for update, _ in grown))
            for (update, _), state in zip(grown, states, strict=True):
                self._finish(update, "append", state)

    def _finish(self, update: _Update, source: Source, state: UserState) -> None:
        """Gives the request its state, and the cache too unless it has a newer one."""
        request = update.request
        _settle(request, source, state)
        if update.keep:
            marks_L = _marks(update, state)
            entry = Entry(
                state,
                state.num_bytes + marks_L.nbytes,
                state.last_event_ts,
                update.history.next_ts(update.end),
                self._known(request.user_key),
                marks_L,
                update.holds_table,
            )
            self._cache.put(request.user_key, self._version, entry)


def _settle(request: Pending, source: Source, state: UserState) -> None:
    request.source, request.state = source, state


def _marks(update: _Update, state: UserState) -> npt.NDArray[np.uint64]:
    """Marks of the events in the state's window: the base's that are still in it, and those of the new events."""
    if update.base is None:
        marks_L = update.history.marks(state.first_index, state.num_events)
        assert marks_L is not None  # the state was made from these very events
        return marks_L
    new_E = update.history.marks(update.base.state.num_events, state.num_events)
    assert new_E is not None  # which were appended
    return np.concatenate([update.base.marks_L[state.first_index - update.base.state.first_index :], new_E])


def _still_true(entry: UserEntry, history: UserHistory) -> bool:
    """Whether the state's events are the same in this history, where others may have come in between."""
    marks_L = history.marks(entry.state.first_index, entry.state.num_events)
    return marks_L is not None and np.array_equal(marks_L, entry.marks_L)


def _events(updates: Iterable[_Update]) -> Histories:
    return Histories.concatenate([update.events for update in updates])
