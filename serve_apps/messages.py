"""Protobuf messages to what the scorer is asked, and back; what is wrong is told as over HTTP. See `scoring.proto`."""

from typing import Any

from longer.errors import UserError
from longer.rpc import scoring_pb2 as pb
from longer.serving.requests import EventsRequest, EventsResult, ScoreRequest, ScoreResult
from serve_apps.access import reason_of, status_of
from serve_apps.bodies import AboutRequest, EventsBody
from serve_apps.protocol import MAX_COLUMNS, Asked, BodyError, Limits, chosen, event_columns, validated


def parse_score(message: pb.ScoreRequest, limits: Limits) -> Asked:
    """The request; BodyError names the field that is wrong and what it should be."""
    ids = _ids(message.candidates)
    limits.check_candidates(len(ids))
    about = validated(AboutRequest, _about(message, limits))
    columns, events = _columns(message, len(ids)), event_columns(about.events, limits)
    request = ScoreRequest(about.user_id, ids, columns, about.request_ts, events, about.request_features)
    return Asked(request, about.top_k)


def parse_score_batch(message: pb.ScoreBatchRequest, limits: Limits) -> list[Asked]:
    """The requests; a BodyError if the message as a whole, or any of them, is not one."""
    if not message.requests:
        raise BodyError(422, "requests: expected one at least")
    limits.check_users(len(message.requests))
    return [parse_score(request, limits) for request in message.requests]


def parse_events(message: pb.AddEventsRequest, limits: Limits) -> EventsRequest:
    """The user and the events; BodyError names the field that is wrong and what it should be."""
    values = {"user_id": value_of(message.user_id), "events": _events(message.events, limits)}
    body = validated(EventsBody, values)
    return EventsRequest(body.user_id, event_columns(body.events, limits))


def score_response(asked: Asked, result: ScoreResult, model_version: str) -> pb.ScoreResponse:
    places = chosen(result, asked.top_k)
    ids = [asked.request.item_ids[c] for c in places]
    state = pb.UserState(source=result.source, num_events=result.num_events, last_event_ts=result.last_event_ts)
    return pb.ScoreResponse(
        candidates=pb.Ids(texts=ids) if isinstance(ids[0], str) else pb.Ids(numbers=ids),
        scores={task: pb.TaskScores(values=scores[places]) for task, scores in result.scores.items()},
        model_version=model_version,
        user_state=state,
    )


def score_result(asked: Asked, outcome: ScoreResult | UserError, model_version: str) -> pb.ScoreResult:
    """One of several."""
    if isinstance(outcome, UserError):
        return pb.ScoreResult(refusal=pb.Refusal(error=reason_of(outcome), status=status_of(outcome)))
    return pb.ScoreResult(response=score_response(asked, outcome, model_version))


def events_response(result: EventsResult, replica: str) -> pb.AddEventsResponse:
    return pb.AddEventsResponse(received=result.num_received, new=result.num_new, replica=replica)


def value_of(message: pb.Id | pb.Value) -> Any:
    """The one of its kinds that it has, None if it has none."""
    kind = message.WhichOneof("kind")
    return getattr(message, kind) if kind else None


def _ids(message: pb.Ids) -> list[Any]:
    if bool(message.numbers) == bool(message.texts):
        raise BodyError(422, "candidates: expected item ids, as `numbers` or as `texts`")
    return list(message.numbers or message.texts)


def _about(message: pb.ScoreRequest, limits: Limits) -> dict[str, Any]:
    of_request = {name: value_of(value) for name, value in message.request_features.items()}
    values = {
        "user_id": value_of(message.user_id),
        "request_features": of_request,
        "events": _events(message.events, limits),
    }
    return values | {name: getattr(message, name) for name in ("request_ts", "top_k") if message.HasField(name)}


def _events(messages: Any, limits: Limits) -> list[dict[str, Any]]:
    return [
        {
            "item_id": value_of(event.item_id),
            "event_ts": event.event_ts if event.HasField("event_ts") else None,
            "action": event.action if event.HasField("action") else None,
            "features": {name: value_of(value) for name, value in event.features.items()},
        }
        for event in messages[: limits.max_events + 1]  # one too many is as good as all of them
    ]


def _columns(message: pb.ScoreRequest, num_candidates: int) -> dict[str, list[Any]]:
    names = [column.name for column in message.features]
    if len(names) > MAX_COLUMNS or len(set(names)) < len(names):
        raise BodyError(422, f"features: at most {MAX_COLUMNS}, each name once")
    if any(len(column.values) != num_candidates for column in message.features):
        raise BodyError(422, "features: expected a value for each candidate")
    return {column.name: [value_of(value) for value in column.values] for column in message.features}
