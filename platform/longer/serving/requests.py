"""What is asked of the scorer and what it answers; values as sent become keys and columns here. No torch, no Ray, no HTTP.

C candidates of one request, N of several.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from time import time
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from longer.data.columns import feature_arrays, missing_features
from longer.data.events import check_rows
from longer.data.items import ItemTable
from longer.data.parse import YEAR_1990_MS
from longer.errors import UserError
from longer.hashing import stable_key, stable_keys
from longer.schema import EventSchema
from longer.table_settings import TimeUnit

Source = Literal["hit", "append", "load", "cold"]
Columns = Mapping[str, Sequence[Any] | pa.Array]
Features = dict[str, npt.NDArray]
T = TypeVar("T")

LAST_MS = 253_402_300_799_999
"""The end of the year 9999, the last time that there is."""
_CLOCK_SKEW = timedelta(minutes=1)
"""How far the clock of whoever sends events may be ahead of this one."""


@dataclass(frozen=True)
class ScoreRequest:
    """Candidates of one user at one time. `item_features` holds, for any of the model's item features, a value a candidate;
    what is None or not there comes from the item catalogue. `request_ts` is in milliseconds; None means now. `events` are the
    user's newest, in columns named as in the event log; the scores see those before `request_ts`. `request_features` holds a
    value of any of the model's features of requests; the others are missing."""

    user_id: int | str
    item_ids: Sequence[int] | Sequence[str] | pa.Array
    item_features: Columns = field(default_factory=dict)
    request_ts: int | None = None
    events: Columns = field(default_factory=dict)
    request_features: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreResult:
    """Scores of each task in the order of the candidates (probabilities of binary tasks), and the state they came from."""

    scores: dict[str, npt.NDArray[np.float32]]
    request_ts: int
    source: Source
    num_events: int
    last_event_ts: int | None


@dataclass(frozen=True)
class EventsRequest:
    """Newest events of one user, in columns named as in the event log."""

    user_id: int | str
    events: Columns


@dataclass(frozen=True)
class EventsResult:
    """How many events came, and how many of them had not been sent here before."""

    num_received: int
    num_new: int


class User(NamedTuple):
    """The id, one row of its column, and what the user is known by in here."""

    id: pa.Array
    key: int


@dataclass(frozen=True)
class _Sent:
    """Candidates, in columns, and what was sent of their features; those of the request are as the model reads them."""

    item_ids: pa.Array
    item_features: dict[str, pa.Array]
    request_features: Features


class RequestReader:
    """Values as sent to what the scorer works with; a UserError names the field at fault and repeats nothing of it."""

    def __init__(self, schema: EventSchema, time_unit: TimeUnit) -> None:
        """`time_unit` is that of the events that requests bring."""
        self._schema, self._time_unit = schema, time_unit
        self._types = {f.name: f.arrow_type for f in schema.features}

    def user(self, user_id: int | str) -> User:
        """The user of this id; a UserError if it is none."""
        column = _column("user_id", [user_id], self._schema.id_types[0])
        return User(column, stable_key(column[0].as_py()))  # of NumPy's integers too

    def users(self, asked: Sequence["ScoreRequest | EventsRequest"]) -> list[User | UserError]:
        """Each request's user, or the error."""
        return [_or_error(self.user, request.user_id) for request in asked]

    def time(self, request_ts: int | None) -> int | UserError:
        """In milliseconds, or the error; now, if none is given."""
        if request_ts is None:
            return now_ms()
        if not 0 <= request_ts <= LAST_MS:
            return UserError("request_ts: expected milliseconds since 1970, up to the year 9999")
        if request_ts < YEAR_1990_MS and self._time_unit == "ms":
            return UserError("request_ts: before 1990: expected milliseconds since 1970, not seconds")
        return request_ts

    def candidates(self, requests: Sequence[ScoreRequest], items: ItemTable | None) -> list[Features | UserError]:
        """Item keys and features [C] of each request's candidates, or its error: features as given, else from the catalogue, else
        missing. With them the features of the request, the same for all. Together they cost little more than one's alone."""
        sent = [_or_error(self._sent, request) for request in requests]
        ids = [one.item_ids for one in sent if isinstance(one, _Sent)]
        if not ids:
            return [one for one in sent if isinstance(one, UserError)]
        item_key_N = stable_keys(pa.concat_arrays(ids))
        found = items.lookup(item_key_N) if items else missing_features(self._schema, "item", len(item_key_N))
        found = {"item_id": item_key_N, **found}
        outcomes, begin = list[Features | UserError](), 0
        for one in sent:
            if isinstance(one, _Sent):
                end = begin + len(one.item_ids)
                outcomes.append(self._with_sent({name: values[begin:end] for name, values in found.items()}, one))
                begin = end
            else:
                outcomes.append(one)
        return outcomes

    def _sent(self, request: ScoreRequest) -> "_Sent":
        schema, known = self._schema, self._schema.features_of("item")
        if not request.item_features.keys() <= set(known):
            raise UserError(f"candidates: unknown item feature: this model reads {', '.join(known) or 'item ids only'}")
        item_ids = _column("candidates", request.item_ids, schema.id_types[1])
        given = {
            name: _column(f"candidates.{name}", values, self._types[name])
            for name, values in request.item_features.items()
        }
        return _Sent(item_ids, given, self._of_request(request.request_features, len(item_ids)))

    def _with_sent(self, found: Features, sent: "_Sent") -> Features:
        for name, values_C in feature_arrays(self._schema, sent.item_features).items():
            is_given_C = sent.item_features[name].is_valid().to_numpy(zero_copy_only=False)
            found[name] = np.where(is_given_C, values_C, found[name])
        return found | sent.request_features

    def _of_request(self, given: Mapping[str, Any], num_candidates: int) -> Features:
        known = self._schema.features_of("request")
        if not given.keys() <= set(known):
            raise UserError(f"request_features: unknown feature: this model reads {', '.join(known) or 'none'}")
        values = {name: _column(f"request_features.{name}", [given[name]], self._types[name]) for name in given}
        one = missing_features(self._schema, "request", 1) | feature_arrays(self._schema, values)
        return {name: np.repeat(value, num_candidates) for name, value in one.items()}

    def events(self, asked: Sequence["ScoreRequest | EventsRequest"]) -> list[pa.Table | UserError | None]:
        """The events that each request brings, as rows of the log (`events_arrow`), each as fit for it as the import job asks; or
        the error of the first that is not; None if there are none."""
        outcomes = [self._raw_events(request) for request in asked]
        raw = [outcome for outcome in outcomes if isinstance(outcome, pa.Table)]
        if not raw:
            return outcomes
        latest = datetime.now(UTC) + _CLOCK_SKEW
        events, unfit = check_rows(pa.concat_tables(raw), self._schema, latest, self._time_unit)
        if len(unfit):
            if len(asked) == 1:
                return [UserError(f"events: {unfit['reason'][0]}: send events as the log will have them")]
            return [outcome for request in asked for outcome in self.events([request])]
        events, begin = events.combine_chunks(), 0
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome, pa.Table):
                outcomes[place] = events.slice(begin, len(outcome))
                begin += len(outcome)
        return outcomes

    def _raw_events(self, request: "ScoreRequest | EventsRequest") -> pa.Table | UserError | None:
        """Columns of the log, of the types that it has or, of times, that are sent."""
        if not request.events:
            return None
        columns, fields = request.events, self._schema.event_fields()
        known = [f.name for f in fields]
        if not columns.keys() <= set(known):
            return UserError(f"events: unknown field: an event here has {', '.join(known)}")
        num_events = max(map(len, columns.values()))
        try:
            raw: dict[str, pa.Array] = {"user_id": pa.repeat(self.user(request.user_id).id[0], num_events)}
            for column in fields:
                wanted = pa.int64() if column.name == "event_ts" else column.type
                values = columns.get(column.name, [None] * num_events)
                raw[column.name] = _column(f"events.{column.name}", values, wanted)
        except UserError as error:
            return error
        return pa.table(raw)


def now_ms() -> int:
    return int(time() * 1000)


def _or_error(function: Callable[[Any], T], given: Any) -> T | UserError:
    try:
        return function(given)
    except UserError as error:
        return error


def _column(field_name: str, values: Sequence[Any] | pa.Array, wanted: pa.DataType) -> pa.Array:
    """The values as an Arrow column; a UserError, without the values, if they are not of the type or not finite."""
    try:
        if isinstance(values, pa.Array) and not _is_like(values.type, wanted):
            raise TypeError
        column = values.cast(wanted) if isinstance(values, pa.Array) else pa.array(values, wanted)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        raise UserError(f"{field_name}: expected {wanted} values") from None
    if pa.types.is_floating(wanted):
        if not pc.all(pc.is_finite(column), min_count=0).as_py():
            raise UserError(f"{field_name}: expected finite {wanted} values")
        column = pc.add(column, pa.scalar(0, wanted))  # -0.0 is 0.0: equal values are one value
    return column


def _is_like(given: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a column of one type may stand for one of the other: a cast alone would make ids of any numbers."""
    if wanted == pa.string():
        return pa.types.is_string(given) or pa.types.is_large_string(given)
    return pa.types.is_integer(given) or (pa.types.is_floating(wanted) and pa.types.is_floating(given))
