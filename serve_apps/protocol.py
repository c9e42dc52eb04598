"""From bodies to requests for the scorer, and from its results to answers. Errors are one line and repeat no value sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import orjson
from pydantic import BaseModel, ValidationError

from longer.errors import UserError
from longer.serving.requests import EventsRequest, EventsResult, ScoreRequest, ScoreResult
from serve_apps.bodies import AboutRequest, Candidate, Event, EventsBody, ScoreBatchBody, ScoreBody

MAX_COLUMNS = 256
"""Most names of features in one body: each becomes a column as long as the body has items."""


_EXPECTED = {
    "user_id": "expected an integer or a string",
    "candidates": "expected a list of item ids, or of objects with an id and features",
    "request_ts": "expected ISO 8601 with a time zone, or milliseconds since 1970",
    "request_features": "expected an object with a value a feature",
    "events": "expected a list of objects with item_id, event_ts, and perhaps action and features",
    "requests": "expected a list of objects as for /v1/score",
    "top_k": "expected a positive integer",
}


class BodyError(UserError):
    """A request that is refused before it reaches the scorer; `status` is the HTTP status that says so."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """The most that one call may bring; a BodyError where it brings more."""

    max_candidates: int
    max_events: int
    max_users: int

    def check_candidates(self, num_candidates: int) -> None:
        if num_candidates > self.max_candidates:
            raise BodyError(413, f"candidates: at most {self.max_candidates} in a request: split them over several")

    def check_users(self, num_requests: int) -> None:
        if num_requests > self.max_users:
            raise BodyError(413, f"requests: at most {self.max_users} in a call: split them over several")


@dataclass(frozen=True)
class Asked:
    """A score request and how many of its candidates to answer with."""

    request: ScoreRequest
    top_k: int | None


B = TypeVar("B", bound=BaseModel)


def parse_score_body(body: bytes, limits: Limits) -> Asked:
    """The request; BodyError names the field that is wrong and what it should be."""
    return _asked(_parsed(ScoreBody, body), limits)


def parse_score_batch_body(body: bytes, limits: Limits) -> list[Asked]:
    """The requests; a BodyError if the body as a whole, or any of them, is not one."""
    parsed = _parsed(ScoreBatchBody, body)
    limits.check_users(len(parsed.requests))
    return [_asked(one, limits) for one in parsed.requests]


def parse_events_body(body: bytes, limits: Limits) -> EventsRequest:
    """The user and the events; BodyError names the field that is wrong and what it should be."""
    parsed = _parsed(EventsBody, body)
    return EventsRequest(parsed.user_id, event_columns(parsed.events, limits))


def parse_about(content: bytes) -> AboutRequest:
    """What goes with candidates that are sent apart, as JSON."""
    return _parsed(AboutRequest, content)


def event_columns(events: Sequence[Event], limits: Limits) -> dict[str, list[Any]]:
    """The events as columns of the log; none if there are none."""
    if len(events) > limits.max_events:
        raise BodyError(413, f"events: at most {limits.max_events} of a user in a call: split them over several")
    if not events:
        return {}
    own: dict[str, list[Any]] = {
        "item_id": [event.item_id for event in events],
        "event_ts": [event.event_ts for event in events],
        "action": [event.action for event in events],
    }
    others = _columns("events", [event.features for event in events])
    if own.keys() & others.keys():
        raise BodyError(422, f"events: {_EXPECTED['events']}; features repeat none of them")
    return {**own, **others}


def _asked(parsed: ScoreBody, limits: Limits) -> Asked:
    limits.check_candidates(len(parsed.candidates))
    ids, features = parsed.candidates, {}
    if Candidate in set(map(type, parsed.candidates)):  # a tenth of the time of a loop
        ids = [c.id if isinstance(c, Candidate) else c for c in parsed.candidates]
        features = _columns("candidates", [c.features if isinstance(c, Candidate) else {} for c in parsed.candidates])
    events = event_columns(parsed.events, limits)
    request = ScoreRequest(parsed.user_id, ids, features, parsed.request_ts, events, parsed.request_features)
    return Asked(request, parsed.top_k)


def _columns(field: str, given: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = {name for features in given for name in features}
    if len(names) > MAX_COLUMNS:
        raise BodyError(422, f"{field}: more than {MAX_COLUMNS} different features")
    return {name: [features.get(name) for features in given] for name in names}


def validated(model: type[B], values: dict[str, Any]) -> B:
    """The body that comes as values, not as JSON; BodyError names the field that is wrong and what it should be."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _body_error(error, model) from None


def _parsed(model: type[B], body: bytes) -> B:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _body_error(error, model) from None


def _body_error(error: ValidationError, model: type[BaseModel]) -> BodyError:
    mistake = error.errors(include_input=False, include_url=False, include_context=False)[0]
    if mistake["type"] == "json_invalid":
        return BodyError(400, "body: not valid JSON")
    field = mistake["loc"][0] if mistake["loc"] else None
    if field not in model.model_fields:
        known = ", ".join(model.model_fields)
        return BodyError(422, f"body: expected an object with no other fields than {known}")
    reason = _EXPECTED[str(field)]
    if len(mistake["loc"]) == 1:
        reason = {"missing": "missing", "too_short": "the list is empty: send at least one"}.get(
            mistake["type"], reason
        )
    return BodyError(422, f"{field}: {reason}")


def chosen(result: ScoreResult, top_k: int | None) -> np.ndarray:
    """Places of the candidates to answer with: all in their order, or the `top_k` best by the first task, best first."""
    first = next(iter(result.scores.values()))
    return np.arange(len(first)) if top_k is None else np.argsort(-first, kind="stable")[:top_k]


def about_result(result: ScoreResult, model_version: str) -> dict[str, Any]:
    """What an answer says besides the scores."""
    state = {"source": result.source, "num_events": result.num_events, "last_event_ts": result.last_event_ts}
    return {"model_version": model_version, "user_state": state}


def score_answer(asked: Asked, result: ScoreResult, model_version: str) -> dict[str, Any]:
    """A `ScoreAnswer`, its scores as arrays."""
    ids, scores = asked.request.item_ids, result.scores
    if asked.top_k is not None:
        places = chosen(result, asked.top_k)
        ids, scores = [ids[c] for c in places], {task: values[places] for task, values in scores.items()}
    told = {task: np.ascontiguousarray(values) for task, values in scores.items()}  # as `as_json` takes them
    return {"candidates": ids, "scores": told, **about_result(result, model_version)}


def events_answer(result: EventsResult, replica: str) -> dict[str, Any]:
    """An `EventsAnswer`."""
    return {"received": result.num_received, "new": result.num_new, "replica": replica}


def as_json(content: dict[str, Any]) -> bytes:
    """Scores in as few digits as tell a float32 from all others."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
