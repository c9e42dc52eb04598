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

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from longer.errors import UserError
from longer.model.engine import StateEngine
from longer.serving.cache import NEVER_TS, Known, StateVersion, Tier
from longer.serving.history import HistorySource, TableRow, UserHistory
from longer.serving.online import OnlineEvents
from longer.serving.pending import Pending, read_rows
from longer.serving.stages import stage
from longer.serving.store import HeldState, StateStore
from longer.serving.updates import Update, Updater


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
        self._windows, self._version, self._updater = engine.model.windows, version, Updater(engine, version, store)
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
            request.settle("hit", held.entry.state)
        self._updater.carry_out([*self._from_memory(in_memory), *self._from_table(with_row)])
        return unread

    def add_events(self, wave: Sequence[Pending]) -> None:
        """Takes in the events of different users, and appends them to the states that are here and need no read for it."""
        self._take_in(wave)
        found = [(request, self._store.hold(request.user_key, self._version)) for request in wave]
        due = [(r, h) for r, h in found if h and h.entry.next_event_ts < r.request_ts and self._goes_on_in_memory(r, h)]
        self._updater.carry_out(self._from_memory(due))

    def bring_up_to_date(self, users: Sequence[Pending]) -> None:
        """The held states of these users, whose rows have been read, are as the table has them now; does not count as a use.

        A state that held all that was known is appended to, up to now, unless it lies in host memory, where its next request finds
        it; one that ended earlier stays so, and one that its user's history no longer agrees with goes.
        """
        found = [
            (user, user.row, held)
            for user in users
            if (held := self._store.hold(user.user_key, self._version))
            and held.entry.user_id == user.id
            and self._online.is_free(user.user_key, user.id)
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
            events, holds_table = history.events(entry.state.num_events, end), end == history.end_index
            update = Update(user, held, events, end, history, self._known(user.user_key), True, holds_table)
            if end == entry.state.num_events:
                self._store.update(user.user_key, update.brought_up_to_date(entry))
            elif held.tier == Tier.DEVICE and self._reaches(held, history, end):
                due.append((update, held))
        self._updater.append(due)

    # -- what is known ------------------------------------------------------------------------------------------------

    def _known(self, user_key: int) -> Known:
        return Known(self._history.version_id, self._online.revision(user_key))

    def _part_namesakes(self, wave: Sequence[Pending]) -> None:
        """What is held under a request's key is her own: of two ids that share a key, who asks last is known here.

        Who waits for her row meanwhile is scored without what she sent, until the table has it.
        """
        for request in wave:
            entry = self._store.peek(request.user_key, self._version)
            if entry and entry.user_id != request.id:
                self._store.drop_stale(request.user_key)
            self._online.forget_others(request.user_key, request.id)

    def _take_in(self, wave: Sequence[Pending]) -> None:
        """New events that all come after a state leave it true: it only ends earlier than it did. Others are found out later."""
        self._part_namesakes(wave)
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

    def _from_memory(self, requests: Sequence[tuple[Pending, HeldState]]) -> list[Update]:
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
            known = self._known(request.user_key)
            updates.append(Update(request, held, new, end, tail, known, keep=True, holds_table=True))
        return updates

    def _from_table(self, requests: Sequence[tuple[Pending, TableRow, HeldState | None]]) -> list[Update]:
        """Updates of the requests that the table's rows can answer; the others have their error."""
        planned = [
            self._plan(request, held, history)
            for (request, _, held), history in zip(requests, self._histories(requests), strict=True)
        ]
        return [update for update in planned if update is not None]

    def _histories(self, requests: Sequence[tuple[Pending, TableRow, HeldState | None]]) -> list[UserHistory]:
        if not requests:
            return []
        online = self._online.of([request.user_key for request, _, _ in requests])
        user_ids = [request.user_id for request, _, _ in requests]
        return self._history.with_online(user_ids, [row for _, row, _ in requests], online)

    def _plan(self, request: Pending, held: HeldState | None, history: UserHistory) -> Update | None:
        """How to bring the user's state to the request's time; None, and the request's error, if the table cannot tell."""
        end, known = history.end_before(request.request_ts), self._known(request.user_key)
        if held and held.entry.known != known and not history.holds(held.entry.events):
            self._store.drop_stale(request.user_key)
            held = None
        holds_table = end == history.end_index
        in_the_past = held is not None and request.request_ts <= held.entry.last_event_ts
        if held and not in_the_past and self._reaches(held, history, end):
            events = history.events(held.entry.state.num_events, end)
            return Update(request, held, events, end, history, known, keep=True, holds_table=holds_table)
        try:
            window = history.window(end, self._windows)
        except UserError as error:
            request.error = error
            return None
        keep = not in_the_past and history.num_events > 0
        return Update(request, None, window, end, history, known, keep, holds_table)

    def _reaches(self, held: HeldState, history: UserHistory, end: int) -> bool:
        """Whether it can be appended to: it ends where the window before `end` has begun, and what is between is there."""
        window_start = self._windows.history_start(end) * self._windows.merge_size
        return held.entry.state.num_events >= max(window_start, history.first_index)
