"""Scores candidates for users from cached states that grow as events arrive. torch, but no HTTP and no Ray.

A request about time t sees exactly the user's events strictly before t: those of the sequence table, and those sent online that
it does not have yet. Whatever the cache holds (`resolver.py`), the scores are those of encoding that history from scratch.

R requests, C candidates in all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from longer.arrays import NO_EVENT_TS, Candidates
from longer.data.items import ItemTable, items_version
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.model.engine import StateEngine
from longer.model.longer import Longer
from longer.model.outputs import to_scores
from longer.model.state_layout import Precision
from longer.serving.cache import StateVersion
from longer.serving.history import HistorySource, check_kept
from longer.serving.kept_states import KeptState
from longer.serving.online import EventLimits, OnlineEvents
from longer.serving.pending import Pending, read_rows
from longer.serving.requests import (
    EventsRequest,
    EventsResult,
    RequestReader,
    ScoreRequest,
    ScoreResult,
)
from longer.serving.resolver import StateResolver
from longer.serving.room import BATCH_USERS
from longer.serving.scorings import Asked, Scoring, prepare, prepared_events, waves
from longer.serving.stages import stage
from longer.serving.store import StateStore
from longer.serving.warm import warm_up
from longer.training.checkpoints import CheckpointInfo, load_appendable

__all__ = ["EventsRequest", "EventsResult", "ScoreRequest", "ScoreResult", "Scorer", "Scoring"]


@dataclass(frozen=True)
class Tables:
    """A version of the sequence table, and the catalogue that belongs to it."""

    sequences: SequenceTable
    items: ItemTable | None


class Scorer:
    """Answers batches of requests with scores equal to encoding each user from scratch. Not thread-safe: give it one thread."""

    def __init__(
        self,
        checkpoint: str,
        sequences: str,
        cache_bytes: int,
        items: str | None = None,
        sequences_version: str | None = None,
        device: str = "cpu",
        event_limits: EventLimits | None = None,
        host_bytes: int = 0,
        state_precision: Precision = "float32",
        is_plain: bool = False,
    ) -> None:
        self._device, self._is_plain = device, is_plain
        self.model, self.info = load_appendable(checkpoint, device)
        self.history = HistorySource(sequences, self.info.schema, sequences_version)
        self._items_path, self._reader = items, RequestReader(self.info.schema, self.history.time_unit)
        self.cache = StateStore(self.model, cache_bytes, host_bytes, state_precision)
        self.online = OnlineEvents(self.info.schema, event_limits or EventLimits())
        self._serve_states()
        self.items = self._items_of(self.history.version_id)

    def load_checkpoint(self, path: str) -> tuple[Longer, CheckpointInfo]:
        """Another model for these tables, to `adopt`; a UserError if it is broken or does not fit them. For any thread."""
        model, info = load_appendable(path, self._device, self.info.schema)
        check_kept(self.history.version, model.windows)
        return model, info

    def adopt(self, model: Longer, info: CheckpointInfo) -> None:
        """Scores with this model from now on. States of others stay, should it be taken back, until they are asked for, which is a
        miss, or anything needs their room: they go before all others.

        Where its states' memory cannot be had, the error leaves the old model serving, from an empty store.
        """
        self._engine.forget_inputs()  # nobody can when its graphs are gone
        del self._engine, self.states  # they hold the pool and its graphs
        try:
            self.cache.fit(model)
            self.model, self.info = model, info
        finally:
            self._serve_states()

    def warm_ups(self, max_requests: int, num_candidates: int) -> Iterator[Callable[[], None]]:
        """Calls that do beforehand what batches of up to `max_requests` requests of so many candidates need once.

        On CUDA, whose scores are captured by size, one for each number of requests that a wave can have; each captures about ten
        graphs at most.
        """
        most = min(max_requests, BATCH_USERS)
        for num_requests in range(1, most + 1 if self.cache.pool.device.type == "cuda" else 2):
            yield partial(self._warm_up, num_requests, num_candidates)

    def _warm_up(self, num_requests: int, num_candidates: int) -> None:
        warm_up(self._engine, self.cache, self.history, num_requests, num_candidates)

    def _serve_states(self) -> None:
        self.version = StateVersion(self.info.model_version, self.info.schema.hash(), self.info.model.encoding)
        self.cache.serve(self.version)
        self._engine = StateEngine(self.model, self.cache.pool, self._is_plain)
        self.states = StateResolver(self._engine, self.version, self.history, self.online, self.cache)

    def newer_tables(self) -> Tables | None:
        """Newer served sequences with their catalogue, to `move_to`; UserError until both are there. For any thread."""
        sequences = self.history.newer()
        if sequences is None:
            return None
        check_kept(sequences.version, self.model.windows)
        return Tables(sequences, self._items_of(sequences.version.id))

    def move_to(self, newer: Tables) -> None:
        """Reads these from now on; states are appended to what they hold that the last ones did not, when their users are asked for
        or looked at again (`bring_up_to_date`)."""
        self.history.move_to(newer.sequences)
        self.items = newer.items

    def held_of_other_tables(self) -> pa.Array:
        """Ids of the held users whose states are as other tables had them, those who were asked for last first."""
        version_id = self.history.version_id
        user_ids = [
            held.entry.user_id
            for held, _ in self.cache.hottest(self.version)
            if held.entry.known.table_version != version_id and held.entry.user_id is not None
        ]
        return pa.array(user_ids, self.info.schema.id_types[0])

    def bring_up_to_date(self, users: Sequence[Pending]) -> None:
        """Brings the states of these users, whose rows have been read, up to date as far as they are still held."""
        try:
            self.states.bring_up_to_date(users)
        finally:
            self.cache.release()

    def _items_of(self, sequences_version: str) -> ItemTable | None:
        schema = self.info.schema
        return (
            ItemTable(self._items_path, schema, items_version(sequences_version, schema)) if self._items_path else None
        )

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult | UserError]:
        """One outcome a request, in order; a request that cannot be answered has its error and does not disturb the others.

        Requests of one user are answered in order, each from the state and the events that the ones before it left.
        """
        scorings = [Scoring(request) for request in requests]
        while unread := self.attempt(scorings):
            with stage("history"):
                read_rows(self.history, unread)
        return [one.outcome for one in scorings if one.outcome is not None]

    def attempt(self, scorings: Sequence[Scoring]) -> list[Pending]:
        """Gives an outcome to all of these that need no row of the table, or have it; those that do, and what their users asked
        after them, are returned: `reads` finds their rows in other threads while this one answers others.

        Whoever asks keeps the order of a user's requests until they have their outcomes.
        """
        prepare(scorings, self._reader, self.items)
        waiting = set[int]()
        unread: list[Pending] = []
        for wave in waves([one.asked for one in scorings if isinstance(one.asked, Asked) and one.outcome is None]):
            behind = [request for request in wave if request.user_key in waiting]
            ready = [request for request in wave if request.user_key not in waiting]
            try:
                left = self.states.settle(ready)
                self._answer([request for request in ready if request.state is not None])
            finally:
                self.cache.release()
            waiting.update(request.user_key for request in left)
            unread += [*behind, *left]
        return unread

    def add_events(self, requests: Sequence[EventsRequest]) -> list[EventsResult | UserError]:
        """Takes in events, one outcome a request, in order; a state that is here, and ends before them, is appended to."""
        outcomes = prepared_events(requests, self._reader)
        for wave in waves([outcome for outcome in outcomes if isinstance(outcome, Pending)]):
            try:
                self.states.add_events(wave)
            finally:
                self.cache.release()
        return [
            o if isinstance(o, UserError) else EventsResult(0 if o.events is None else len(o.events), o.num_new_events)
            for o in outcomes
        ]

    def warmable(self, users: Sequence[Pending]) -> list[Pending]:
        """Those of whom no state is here, as far as none has to go for them; `BATCH_USERS` at most."""
        most = self.cache.free_bytes // self.cache.most_state_bytes
        unknown = [
            user
            for user in users
            if self.cache.peek(user.user_key, self.version) is None and self.online.is_free(user.user_key, user.id)
        ]
        return unknown[: min(most, BATCH_USERS)]

    def warm(self, users: Sequence[Pending]) -> int:
        """Encodes those who are `warmable`; how many. Nothing is read here of whom a row is there."""
        wave = self.warmable(users)
        try:
            self.states.resolve(wave)
        finally:
            self.cache.release()
        return sum(request.error is None for request in wave)

    def restore(self, kept: KeptState, events_revision: int | None) -> bool:
        """Takes a state of a replica that has stopped into host memory, if there is room and none of its user; whether it is there.

        `events_revision` is that of the user's online events when they were exactly those that the replica had.
        """
        entry = kept.entry_with(events_revision)
        return self.cache.restore(kept.user_key, self.version, entry, kept.words_NI, kept.is_protected)

    def user_key(self, user_id: int | str) -> int:
        """What the user is known by in here. A UserError if it is no user id."""
        return self._reader.user(user_id).key

    def forget(self, user_id: int | str) -> bool:
        """Drops the user's state, from all tiers, and online events; whether there was any. A UserError if it is no user id."""
        return self.forget_key(self.user_key(user_id))

    def forget_key(self, user_key: int) -> bool:
        """The same of who is known by this."""
        self._engine.forget_inputs()  # which may be of this user; before the store, whose last row replays write to
        had_events, had_state = self.online.forget(user_key), self.cache.forget(user_key)
        return had_events or had_state

    def _answer(self, requests: Sequence[Asked]) -> None:
        if not requests:
            return
        offsets_R1 = np.cumsum([0, *(len(request.candidates["item_id"]) for request in requests)])
        features = {
            name: np.concatenate([request.candidates[name] for request in requests]) for name in requests[0].candidates
        }
        states = [request.state for request in requests if request.state is not None]
        request_ts_R = np.array([request.request_ts for request in requests], np.int64)
        outputs_CT = self._engine.score(states, request_ts_R, Candidates(offsets_R1, features))
        scores = to_scores(outputs_CT, self.model.tasks)
        for request, state, start, end in zip(requests, states, offsets_R1[:-1], offsets_R1[1:], strict=True):
            assert request.source is not None
            own = {task: values[start:end] for task, values in scores.items()}
            last = None if state.last_event_ts == NO_EVENT_TS else state.last_event_ts
            request.result = ScoreResult(own, request.request_ts, request.source, state.num_events, last)
            self.cache.counters.count(request.source)
