"""Brings states to the times of requests as `resolver` says: encodes them, appends to them, or finds them as they should be. torch,
but no HTTP and no Ray."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from longer.arrays import Histories
from longer.model.engine import StateEngine
from longer.model.states import UserState, rows_for
from longer.serving.cache import Entry, Known, StateVersion
from longer.serving.fingerprint import EventPrint, Sums, event_marks
from longer.serving.history import UserHistory
from longer.serving.pending import Pending
from longer.serving.requests import Source
from longer.serving.stages import stage
from longer.serving.store import HeldState, StateEntry, StateStore


@dataclass(frozen=True)
class Update:
    """What brings a user's state to a request's time: `events` after `base`, or a whole window without one.

    `known` is what `history` was made from.
    """

    request: Pending
    base: HeldState | None
    events: Histories
    end: int
    history: UserHistory
    known: Known
    keep: bool
    holds_table: bool

    def brought_up_to_date(self, entry: StateEntry) -> StateEntry:
        """The entry of a state that ends where it should."""
        next_ts = self.history.next_ts(self.end)
        return replace(entry, known=self.known, next_event_ts=next_ts, holds_table=self.holds_table)


class Updater:
    """Gives requests their states; those worth keeping stay in `store`."""

    def __init__(self, engine: StateEngine, version: StateVersion, store: StateStore) -> None:
        self._engine, self._version, self._store = engine, version, store

    def carry_out(self, updates: Sequence[Update]) -> None:
        """Of different users."""
        self._encode([update for update in updates if update.base is None])
        with_base = [(update, update.base) for update in updates if update.base is not None]
        self._confirm([(u, base) for u, base in with_base if u.end == base.entry.state.num_events])
        self.append([(u, base) for u, base in with_base if u.end != base.entry.state.num_events])

    def _confirm(self, updates: Sequence[tuple[Update, HeldState]]) -> None:
        """The states are as they should be; what is known of them is brought up to date."""
        self._store.bring(held for _, held in updates)
        for update, held in updates:
            update.request.settle("hit", held.entry.state)
            self._store.update(update.request.user_key, update.brought_up_to_date(held.entry))

    def _encode(self, updates: Sequence[Update]) -> None:
        if not updates:
            return
        store, histories = self._store, _events(updates)
        slots = store.slots(rows_for(store.layout, histories.end_index_B))
        with stage("encode"):
            states = self._engine.encode(histories, slots)
        for update, state, marks_E in zip(updates, states, _marks(histories), strict=True):
            self._finish(update, "load" if update.end else "cold", state, marks_E)

    def append(self, updates: Sequence[tuple[Update, HeldState]]) -> None:
        """To these states. Where a state has outgrown its slot, it gets another; else it grows in place."""
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
            for (update, _), state, marks_E in zip(updates, states, _marks(new), strict=True):
                self._finish(update, "append", state, marks_E)
        except BaseException:
            for update, _ in updates:  # half-written, or longer than what is known of them
                store.drop_stale(update.request.user_key)
            raise

    def _finish(self, update: Update, source: Source, state: UserState, marks_E: Sums) -> None:
        """Gives the request its state, and the store too unless it has a newer one."""
        request, base = update.request, update.base
        request.settle(source, state)
        if not update.keep:
            return
        entry = Entry(
            state,
            state.last_event_ts,
            update.history.next_ts(update.end),
            update.known,
            _print(update, state, marks_E, self._engine.model.windows.stride_events),
            update.holds_table,
            request.id,
        )
        if base is not None and base.entry.state.slot is state.slot:
            self._store.update(request.user_key, entry)
        else:
            self._store.put(request.user_key, self._version, entry)


def _print(update: Update, state: UserState, marks_E: Sums, stride_events: int) -> EventPrint:
    """Of the events in the state's window: the base's that are still in it, and the new ones."""
    before = update.base.entry.events if update.base else EventPrint.from_start(int(update.events.first_index_B[0]))
    return before.followed_by(marks_E, stride_events).from_index(state.first_index, stride_events)


def _marks(histories: Histories) -> list[Sums]:
    """Of each user's events."""
    return np.split(event_marks(histories), histories.offsets_B1[1:-1])


def _events(updates: Iterable[Update]) -> Histories:
    return Histories.concatenate([update.events for update in updates])
