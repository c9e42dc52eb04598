"""Scores candidates for users from cached states that grow as events arrive. torch, but no HTTP and no Ray.

A request about time t must see exactly the user's events strictly before t. Per user, by what the cache holds:

    hit      the state ends there: nothing is read
    append   the state ends earlier: the user is read, and the events since are appended
    load     no state, or t lies before the state's last event: the user is read and encoded; a newer state is kept
    cold     the user has no events before t: the state of an empty history, not kept for users whom the table does not know

All four give the scores of encoding from scratch. The sequence table may move to a newer version: a state then stays only if
its own events are the same there, byte for byte.

R requests, C candidates in all of them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import time
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from longer.arrays import NO_EVENT_TS, Candidates, Histories, Int64
from longer.data.items import ItemTable, item_features, items_version
from longer.errors import StorageError, UserError
from longer.hashing import stable_keys
from longer.model.outputs import to_scores
from longer.model.states import UserState, append, encode, score
from longer.serving.cache import Entry, StateCache, StateVersion
from longer.serving.history import HistorySource, UserHistory
from longer.training.checkpoints import load_model

Source = Literal["hit", "append", "load", "cold"]
UserEntry = Entry[UserState]


@dataclass(frozen=True)
class ScoreRequest:
    """Candidates of one user at one time. `item_features` holds, for any of the model's item features, a value a candidate;
    what is None or not there comes from the item catalogue. `request_ts` is in milliseconds; None means now."""

    user_id: int | str
    item_ids: Sequence[int] | Sequence[str]
    item_features: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    request_ts: int | None = None


@dataclass(frozen=True)
class ScoreResult:
    """Scores of each task in the order of the candidates (probabilities of binary tasks), and the state they came from."""

    scores: dict[str, npt.NDArray[np.float32]]
    request_ts: int
    source: Source
    num_events: int
    last_event_ts: int | None


@dataclass
class _Pending:
    """A request on its way to scores: keys now, its user's state when resolved."""

    user_id: pa.Array
    user_key: int
    request_ts: int
    candidates: dict[str, npt.NDArray]
    source: Source | None = None
    state: UserState | None = None
    error: UserError | None = None


@dataclass(frozen=True)
class _Update:
    """What brings a user's state to a request's time: `events` after `base`, or a whole window without one."""

    request: _Pending
    base: UserEntry | None
    events: Histories
    end: int
    history: UserHistory
    keep: bool


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
    ) -> None:
        self.model, self.info = load_model(checkpoint, device)
        self.history = HistorySource(sequences, self.info.schema, sequences_version)
        self._items_path = items
        self.items = self._items_of(self.history.version_id)
        self.cache: StateCache[UserState] = StateCache(cache_bytes)
        self.version = StateVersion(self.info.model_version, self.info.schema.hash(), self.info.model.encoding)

    def refresh(self) -> bool:
        """Goes over to newer served sequences with their catalogue; UserError, and no change, until both are there."""
        newer = self.history.newer_version()
        if newer is None:
            return False
        self.items = self._items_of(newer)
        self.history.move_to(newer)
        return True

    def _items_of(self, sequences_version: str) -> ItemTable | None:
        schema = self.info.schema
        return (
            ItemTable(self._items_path, schema, items_version(sequences_version, schema)) if self._items_path else None
        )

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult | UserError]:
        """One outcome a request, in order; a request that cannot be answered has its error and does not disturb the others.

        Requests of one user are answered in order, each from the state that the one before it left.
        """
        outcomes: list[_Pending | UserError] = [self._prepare(request) for request in requests]
        pending = [outcome for outcome in outcomes if isinstance(outcome, _Pending)]
        for wave in _waves(pending):
            self._resolve(wave)
        answered = iter(self._results([p for p in pending if p.error is None]))
        return [o if isinstance(o, UserError) else o.error or next(answered) for o in outcomes]

    # -- requests to keys ---------------------------------------------------------------------------------------------

    def _prepare(self, request: ScoreRequest) -> _Pending | UserError:
        schema = self.info.schema
        user_type, item_type = schema.id_types
        known = schema.features_of("item")
        if not request.item_features.keys() <= set(known):
            return UserError(
                f"candidates: unknown item feature: this model reads {', '.join(known) or 'item ids only'}"
            )
        try:
            user_id = _column("user_id", [request.user_id], user_type)
            item_key_C = stable_keys(_column("candidates", request.item_ids, item_type))
            given = {
                name: _column(
                    f"candidates.{name}", values, next(f.arrow_type for f in schema.features if f.name == name)
                )
                for name, values in request.item_features.items()
            }
        except UserError as error:
            return error
        request_ts = int(time() * 1000) if request.request_ts is None else request.request_ts
        candidates = {"item_id": item_key_C, **self._features(item_key_C, given)}
        return _Pending(user_id, int(stable_keys(user_id)[0]), request_ts, candidates)

    def _features(self, item_key_C: Int64, given: dict[str, pa.Array]) -> dict[str, npt.NDArray]:
        """The candidates' features: as given, else from the catalogue, else missing."""
        schema = self.info.schema
        found = (
            self.items.lookup(item_key_C)
            if self.items
            else {
                name: np.zeros(
                    len(item_key_C), np.int64 if name in schema.features_of("item", "categorical") else np.float32
                )
                for name in schema.features_of("item")
            }
        )
        for name, values_C in item_features(schema, given).items():
            is_given_C = given[name].is_valid().to_numpy(zero_copy_only=False)
            found[name] = np.where(is_given_C, values_C, found[name])
        return found

    # -- requests to states -------------------------------------------------------------------------------------------

    def _resolve(self, wave: Sequence[_Pending]) -> None:
        """Gives each request, of different users, its user's state at its time."""
        held = [self.cache.get(request.user_key, self.version) for request in wave]
        to_read: list[tuple[_Pending, UserEntry | None]] = []
        for request, entry in zip(wave, held, strict=True):
            if entry and entry.answers(request.request_ts, self.history.version_id):
                self._settle(request, "hit", entry.state)
            else:
                to_read.append((request, entry))
        if not to_read:
            return
        updates = [
            update
            for (request, entry), history in zip(to_read, self._read([request for request, _ in to_read]), strict=True)
            if history is not None and (update := self._plan(request, entry, history)) is not None
        ]
        whole = [update for update in updates if update.base is None]
        grown = [(update, update.base.state) for update in updates if update.base is not None]
        if whole:
            for update, state in zip(whole, encode(self.model, _events(whole)), strict=True):
                self._finish(update, "load" if update.end else "cold", state)
        if grown:
            bases = [base for _, base in grown]
            for (update, _), state in zip(grown, append(self.model, bases, _events(u for u, _ in grown)), strict=True):
                self._finish(update, "append", state)

    def _read(self, requests: Sequence[_Pending]) -> list[UserHistory | None]:
        """Each request's user; None, and the request's error, where the table cannot be read: others are not disturbed."""
        try:
            return list(self.history.read(pa.concat_arrays([request.user_id for request in requests])))
        except StorageError as error:
            if len(requests) == 1:
                requests[0].error = error
                return [None]
        return [self._read([request])[0] for request in requests]

    def _plan(self, request: _Pending, entry: UserEntry | None, history: UserHistory) -> _Update | None:
        """How to bring the user's state to the request's time; None, and the request's error, if the table cannot tell."""
        end, windows = history.end_before(request.request_ts), self.model.windows
        if entry and entry.table_version != self.history.version_id and not _still_true(entry, history):
            self.cache.drop_stale(request.user_key)
            entry = None
        in_the_past = entry is not None and request.request_ts <= entry.last_event_ts
        window_start = windows.history_start(end) * windows.merge_size
        if entry and not in_the_past and entry.state.num_events >= max(window_start, history.first_index):
            events = history.events(entry.state.num_events, end)
            return _Update(request, entry, events, end, history, keep=True)
        try:
            return _Update(
                request,
                None,
                history.window(end, windows),
                end,
                history,
                keep=not in_the_past and history.num_events > 0,
            )
        except UserError as error:
            request.error = error
            return None

    def _finish(self, update: _Update, source: Source, state: UserState) -> None:
        """Gives the request its state, and the cache too unless it has a newer one."""
        self._settle(update.request, source, state)
        if update.keep:
            digest = update.history.digest(state.first_index, state.num_events)
            assert digest is not None  # the state was made from these very events, or checked against them
            entry = Entry(
                state,
                state.num_bytes,
                state.last_event_ts,
                update.history.next_ts(update.end),
                self.history.version_id,
                digest,
            )
            self.cache.put(update.request.user_key, self.version, entry)

    def _settle(self, request: _Pending, source: Source, state: UserState) -> None:
        request.source, request.state = source, state
        counters = self.cache.counters
        setattr(counters, source, getattr(counters, source) + 1)

    # -- states to scores ---------------------------------------------------------------------------------------------

    def _results(self, requests: Sequence[_Pending]) -> Iterator[ScoreResult]:
        if not requests:
            return
        offsets_R1 = np.cumsum([0, *(len(request.candidates["item_id"]) for request in requests)])
        features = {
            name: np.concatenate([request.candidates[name] for request in requests]) for name in requests[0].candidates
        }
        states = [request.state for request in requests if request.state is not None]
        request_ts_R = np.array([request.request_ts for request in requests], np.int64)
        outputs_CT = score(self.model, states, request_ts_R, Candidates(offsets_R1, features))
        for request, state, start, end in zip(requests, states, offsets_R1[:-1], offsets_R1[1:], strict=True):
            assert request.source is not None
            scores = to_scores(outputs_CT[start:end], self.model.tasks)
            last = None if state.last_event_ts == NO_EVENT_TS else state.last_event_ts
            yield ScoreResult(scores, request.request_ts, request.source, state.num_events, last)


def _waves(requests: Sequence[_Pending]) -> list[list[_Pending]]:
    """The requests in waves of different users; wave i holds the i-th request of each."""
    waves: list[list[_Pending]] = []
    asked: dict[int, int] = {}
    for request in requests:
        number = asked.get(request.user_key, 0)
        asked[request.user_key] = number + 1
        if number == len(waves):
            waves.append([])
        waves[number].append(request)
    return waves


def _still_true(entry: UserEntry, history: UserHistory) -> bool:
    """Whether the state's events are the same in this table version, where late events may have come in between."""
    return history.digest(entry.state.first_index, entry.state.num_events) == entry.history_digest


def _events(updates: Iterable[_Update]) -> Histories:
    return Histories.concatenate([update.events for update in updates])


def _column(field_name: str, values: Sequence[Any], wanted: pa.DataType) -> pa.Array:
    """The values as an Arrow column; a UserError, without the values, if they are not of the type."""
    try:
        return pa.array(values, wanted)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError, OverflowError):
        raise UserError(f"{field_name}: expected {wanted} values") from None
