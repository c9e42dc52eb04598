"""The same client as `longer.client` over gRPC, for a service whose Serve config has `grpc_options`.

    client = GrpcScoringClient("127.0.0.1:8322", token=os.environ.get("LONGER_SCORING_TOKEN"))
    client.score(900, [1095275, 42], top_k=1)["scores"]

Needs `grpcio` and `protobuf`, which Ray brings along.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc

from longer.errors import UserError
from longer.patience import Patience, as_ms, each_answered
from longer.ring import session_of
from longer.rpc import scoring_pb2 as pb
from longer.rpc.scoring_pb2_grpc import ScoringStub

_REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.UNAUTHENTICATED)
_PAUSES_S = {
    grpc.StatusCode.UNAVAILABLE: 0.5,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 1.0,
    grpc.StatusCode.INTERNAL: 0.1,
}
"""Before a call is repeated: a service that is full, or not there, needs longer than one of whose replicas one has just died."""

_NOTHING: Mapping[str, Any] = {}


class GrpcScoringClient:
    """Every call is safe to repeat, so one that finds no connection, a full service or a replica that dies with it is, after a
    pause that grows; so are those of a batch's requests that are answered 503. `timeout_s` is for all of it, and the service is
    told what is left. For any number of threads. With `credentials` the channel is encrypted, as for a service behind a gateway.

    A call that is refused raises a UserError with the service's reason; one that is not answered, a `grpc.RpcError`.
    """

    def __init__(
        self,
        target: str,
        token: str | None = None,
        timeout_s: float = 2.0,
        max_retries: int = 2,
        application: str = "scoring",
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._target, self._timeout_s, self._max_retries = target, timeout_s, max_retries
        any_size = [("grpc.max_receive_message_length", -1)]  # too large an answer would look like a full service
        channel = (
            grpc.secure_channel(target, credentials, any_size)
            if credentials
            else grpc.insecure_channel(target, any_size)
        )
        self._channel, self._stub = channel, ScoringStub(channel)
        self._metadata = [("application", application)]
        if token:
            self._metadata.append(("authorization", f"Bearer {token}"))

    def score(
        self,
        user_id: int | str,
        candidates: Sequence[Any],
        request_ts: int | None = None,
        events: Sequence[Mapping[str, Any]] = (),
        top_k: int | None = None,
        request_features: Mapping[str, Any] = _NOTHING,
    ) -> dict[str, Any]:
        """What the HTTP client answers; candidates are ids, or objects with `id` and `features`, times milliseconds since 1970."""
        request = _score_request(user_id, candidates, request_ts, events, top_k, request_features)
        return _score_answer(self._call(self._stub.Score, request, user_id, self._patience()))

    def score_batch(self, asked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One result a request, in order: scores, or `error` and `status`."""

        def ask(some: Sequence[Mapping[str, Any]], patience: Patience) -> list[dict[str, Any]]:
            request = pb.ScoreBatchRequest(requests=[_score_request(**one) for one in some])
            return list(map(_result, self._call(self._stub.ScoreBatch, request, None, patience).results))

        return each_answered(ask, asked, self._patience(), grpc.RpcError)

    def add_events(self, user_id: int | str, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """How many events were received, how many of them were new, and to which replica."""
        request = pb.AddEventsRequest(user_id=_id(user_id), events=list(map(_event, events)))
        answer = self._call(self._stub.AddEvents, request, user_id, self._patience())
        return {"received": answer.received, "new": answer.new, "replica": answer.replica}

    def forget(self, user_id: int | str) -> dict[str, int]:
        """Makes every replica drop what it holds of the user."""
        answer = self._call(
            self._stub.ForgetUser, pb.ForgetUserRequest(user_id=_id(user_id)), user_id, self._patience()
        )
        return {"replicas": answer.replicas, "held": answer.held}

    def close(self) -> None:
        self._channel.close()

    def _patience(self) -> Patience:
        return Patience(self._timeout_s, self._max_retries)

    def _call(self, method: Callable[..., Any], request: Any, user_id: int | str | None, patience: Patience) -> Any:
        metadata = self._metadata
        if user_id is not None:
            metadata = [*metadata, ("session_id", session_of(user_id))]  # as over HTTP: the same replica
        while True:
            left_s = patience.left_s()
            try:
                told = [*metadata, ("x-timeout-ms", as_ms(left_s))]
                return method(request, metadata=told, timeout=left_s)
            except grpc.RpcError as error:
                code = error.code()
                if code in _REFUSED:
                    raise UserError(f"{self._target}: {error.details()} ({code.name})") from None
                if code not in _PAUSES_S or not patience.pauses(_PAUSES_S[code]):
                    raise


def _score_request(
    user_id: int | str,
    candidates: Sequence[Any],
    request_ts: int | None = None,
    events: Sequence[Mapping[str, Any]] = (),
    top_k: int | None = None,
    request_features: Mapping[str, Any] = _NOTHING,
) -> pb.ScoreRequest:
    objects = [c if isinstance(c, Mapping) else {"id": c} for c in candidates]
    given = [one.get("features", {}) for one in objects]
    names = dict.fromkeys(name for features in given for name in features)
    return pb.ScoreRequest(
        user_id=_id(user_id),
        candidates=_ids([one["id"] for one in objects]),
        features=[pb.Column(name=name, values=[_value(features.get(name)) for features in given]) for name in names],
        request_ts=request_ts,
        events=list(map(_event, events)),
        top_k=top_k,
        request_features={name: _value(value) for name, value in request_features.items()},
    )


def _result(result: pb.ScoreResult) -> dict[str, Any]:
    if result.HasField("response"):
        return _score_answer(result.response)
    return {"error": result.refusal.error, "status": result.refusal.status}


def _score_answer(answer: pb.ScoreResponse) -> dict[str, Any]:
    state, ids = answer.user_state, answer.candidates
    last_event_ts = state.last_event_ts if state.HasField("last_event_ts") else None
    return {
        "candidates": list(ids.numbers or ids.texts),
        "scores": {task: list(scores.values) for task, scores in answer.scores.items()},
        "model_version": answer.model_version,
        "user_state": {"source": state.source, "num_events": state.num_events, "last_event_ts": last_event_ts},
    }


def _id(value: int | str) -> pb.Id:
    return pb.Id(text=value) if isinstance(value, str) else pb.Id(number=value)


def _ids(values: Sequence[Any]) -> pb.Ids:
    return pb.Ids(texts=values) if values and isinstance(values[0], str) else pb.Ids(numbers=values)


def _value(value: Any) -> pb.Value:
    if value is None:
        return pb.Value()
    if isinstance(value, str):
        return pb.Value(text=value)
    return pb.Value(integer=value) if isinstance(value, int) else pb.Value(number=value)


def _event(event: Mapping[str, Any]) -> pb.Event:
    features = {name: _value(value) for name, value in event.get("features", {}).items()}
    return pb.Event(
        item_id=_id(event["item_id"]), event_ts=event["event_ts"], action=event.get("action"), features=features
    )
