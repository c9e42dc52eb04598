"""What goes over HTTP: JSON bodies in, requests for the scorer out, and back. Errors are one line and repeat no value sent."""

import json
from datetime import datetime
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from longer.errors import UserError
from longer.serving.scorer import ScoreRequest, ScoreResult

_LAST_MS = 253_402_300_799_999  # the end of the year 9999


def _milliseconds(value: Any) -> Any:
    if isinstance(value, str):
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError("no time zone")
        return int(moment.timestamp() * 1000)
    return value


class Candidate(BaseModel):
    """An item and those of its features that the caller knows better than the catalogue."""

    model_config = ConfigDict(extra="forbid")

    id: StrictInt | StrictStr
    features: dict[str, StrictStr | float | None] = Field(default_factory=dict)


class ScoreBody(BaseModel):
    """POST /v1/score"""

    model_config = ConfigDict(extra="forbid")

    user_id: StrictInt | StrictStr
    candidates: list[StrictInt | StrictStr | Candidate] = Field(min_length=1)
    request_ts: Annotated[int, BeforeValidator(_milliseconds), Field(strict=True, ge=0, le=_LAST_MS)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=1)] | None = None


_EXPECTED = {
    "user_id": "expected an integer or a string",
    "candidates": "expected a list of item ids, or of objects with an id and features",
    "request_ts": "expected ISO 8601 with a time zone, or milliseconds since 1970",
    "top_k": "expected a positive integer",
}


class BodyError(UserError):
    """A body that does not become a request; `status` is the HTTP status that says so."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def parse_score_body(body: bytes, max_candidates: int) -> tuple[ScoreRequest, int | None]:
    """The request and its top_k; BodyError names the field that is wrong and what it should be."""
    try:
        parsed = ScoreBody.model_validate_json(body)
    except ValidationError as error:
        raise _body_error(error) from None
    if len(parsed.candidates) > max_candidates:
        raise BodyError(413, f"candidates: at most {max_candidates} in a request: split them over several")
    ids = [c.id if isinstance(c, Candidate) else c for c in parsed.candidates]
    given = [c.features if isinstance(c, Candidate) else {} for c in parsed.candidates]
    names = {name for features in given for name in features}
    item_features = {name: [features.get(name) for features in given] for name in names}
    return ScoreRequest(parsed.user_id, ids, item_features, parsed.request_ts), parsed.top_k


def _body_error(error: ValidationError) -> BodyError:
    mistake = error.errors(include_input=False, include_url=False, include_context=False)[0]
    if mistake["type"] == "json_invalid":
        return BodyError(400, "body: not valid JSON")
    field = mistake["loc"][0] if mistake["loc"] else None
    if field not in _EXPECTED:
        known = ", ".join(_EXPECTED)
        return BodyError(422, f"body: expected an object with no other fields than {known}")
    reason = "missing" if mistake["type"] == "missing" and len(mistake["loc"]) == 1 else _EXPECTED[str(field)]
    return BodyError(422, f"{field}: {reason}")


def score_response(request: ScoreRequest, result: ScoreResult, top_k: int | None, model_version: str) -> bytes:
    """Scores in the order of the candidates, or of the `top_k` best by the first task, best first."""
    chosen = np.arange(len(request.item_ids))
    if top_k is not None:
        chosen = np.argsort(-next(iter(result.scores.values())), kind="stable")[:top_k]
    response = {
        "candidates": [request.item_ids[c] for c in chosen],
        "scores": {task: scores[chosen].tolist() for task, scores in result.scores.items()},
        "model_version": model_version,
        "user_state": {
            "source": result.source,
            "num_events": result.num_events,
            "last_event_ts": result.last_event_ts,
        },
    }
    return json.dumps(response).encode()
