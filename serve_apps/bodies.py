"""What goes over HTTP as JSON, field by field: bodies in, answers out. These models are also the service's OpenAPI document."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, StrictInt, StrictStr, WithJsonSchema

from longer.data.events import epoch_ms
from longer.serving.requests import LAST_MS


def _milliseconds(value: Any) -> Any:
    if isinstance(value, str):
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError("no time zone")
        return epoch_ms(moment)
    return value


Id = StrictInt | StrictStr
Value = StrictStr | StrictInt | Annotated[float, Strict(), Field(allow_inf_nan=False)] | None
Time = Annotated[
    int,
    BeforeValidator(_milliseconds),
    Field(strict=True, ge=0, le=LAST_MS),
    WithJsonSchema(
        {
            "description": "Milliseconds since 1970 UTC, or ISO 8601 with a time zone.",
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": LAST_MS},
                {"type": "string", "format": "date-time"},
            ],
        }
    ),
]
TopK = Annotated[int, Field(strict=True, ge=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Candidate(_Body):
    """An item and those of its features that the caller knows better than the catalogue."""

    id: Id
    features: dict[str, Value] = Field(default_factory=dict)


class Event(_Body):
    """A row of the event log; `features` holds its other columns by name."""

    item_id: Id
    event_ts: Time
    action: StrictStr | None = None
    features: dict[str, Value] = Field(default_factory=dict)


class AboutRequest(_Body):
    """A score request but for its candidates."""

    user_id: Id
    request_ts: Time | None = None
    request_features: dict[str, Value] = Field(default_factory=dict)
    events: list[Event] = Field(default_factory=list)
    top_k: TopK | None = None


class ScoreBody(AboutRequest):
    """POST /v1/score"""

    candidates: list[Id | Candidate] = Field(min_length=1)


class ScoreBatchBody(_Body):
    """POST /v1/score:batch"""

    requests: list[ScoreBody] = Field(min_length=1)


class EventsBody(_Body):
    """POST /v1/events"""

    user_id: Id
    events: list[Event] = Field(min_length=1)


class StateAnswer(BaseModel):
    """The state that scores came from."""

    source: Literal["hit", "append", "load", "cold"]
    num_events: int
    last_event_ts: int | None


class ScoreAnswer(BaseModel):
    """Scores by task, in the order of `candidates`."""

    candidates: list[int | str]
    scores: dict[str, list[float]]
    model_version: str
    user_state: StateAnswer


class ErrorAnswer(BaseModel):
    """What is wrong and what to do, in one line."""

    error: str


class ItemErrorAnswer(ErrorAnswer):
    """What is wrong with one request of several, and the status that it would have had alone."""

    status: int


class ScoreBatchAnswer(BaseModel):
    """One result a request, in order."""

    results: list[ScoreAnswer | ItemErrorAnswer]


class EventsAnswer(BaseModel):
    """Events received, and how many of them `replica`, which knows them from now on, had not been sent before."""

    received: int
    new: int
    replica: str


class ForgetAnswer(BaseModel):
    """Replicas that have dropped what they held of the user, and how many held anything."""

    replicas: int
    held: int


class ReplicasAnswer(BaseModel):
    """The address of each replica that runs; null: only behind the one that was asked."""

    urls: dict[str, str | None]
