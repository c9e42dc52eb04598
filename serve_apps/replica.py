"""One scorer with its cache behind HTTP. Everything that touches the scorer runs in its one worker thread."""

import asyncio
import hashlib
import hmac
import logging
import resource
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from ray import serve
from ray.serve.exceptions import RayServeException
from starlette.requests import ClientDisconnect

from longer.errors import StorageError, UserError, one_line
from longer.serving.scorer import EventsRequest, EventsResult, Scorer, ScoreRequest, ScoreResult
from serve_apps.affinity import Ring
from serve_apps.arguments import Rollout, ScoringArgs
from serve_apps.arrow_body import ARROW, arrow_answer, parse_arrow_body
from serve_apps.metrics import ReplicaMetrics
from serve_apps.openapi import about_call, body_of, errors, responds, with_security
from serve_apps.protocol import (
    BodyError,
    EventsAnswer,
    EventsBody,
    ForgetAnswer,
    ScoreAnswer,
    ScoreBatchAnswer,
    ScoreBatchBody,
    ScoreBody,
    as_json,
    events_answer,
    parse_events_body,
    parse_score_batch_body,
    parse_score_body,
    score_answer,
)

SESSION_HEADER, TIMEOUT_HEADER = "x-session-id", "x-timeout-ms"
RETRY_AFTER_S = 1
_READY_WITHIN_S = 2.0
_RING_WITHIN_S = 5.0
_UNREADABLE = "the sequence table cannot be read at the moment: try again later"
_logger = logging.getLogger("ray.serve")


class _Api(FastAPI):
    def openapi(self) -> dict[str, Any]:
        return with_security(super().openapi())


api = _Api(title="longer scoring", version="1")

Answer = tuple[bytes, str]
JSON = "application/json"


# Above the class that uses them: Serve pickles the application's functions, with their globals, as it decorates the class.
def _status(error: UserError) -> int:
    if isinstance(error, StorageError):
        return 503
    return error.status if isinstance(error, BodyError) else 422


def _reason(error: UserError) -> str:
    """A table's path is for the log, not for callers."""
    if isinstance(error, StorageError):
        _logger.error("%s", error)
        return _UNREADABLE
    return str(error)


def _content_type_of(request: Request, *known: str) -> str:
    """The body's content type, the first of `known` if none is stated; a BodyError if it is none of them."""
    stated = request.headers.get("content-type", known[0]).partition(";")[0].strip().lower()
    if stated not in known:
        raise BodyError(415, f"content-type: expected {' or '.join(known)}")
    return stated


def _id_of(text: str, user_id_type: str) -> int | str:
    if user_id_type == "string" and text:
        return text
    if user_id_type == "string" or not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 21):
        raise BodyError(422, f"user_id: expected {user_id_type}")
    return int(text)


@serve.deployment
@serve.ingress(api)
class ScoringReplica:
    """Answers as `serve_apps/scoring.py` says."""

    def __init__(self, args: ScoringArgs) -> None:
        self._args = args
        token = args.token()
        self._token_digest = hashlib.sha256(token.encode()).digest() if token else None
        self._worker = ThreadPoolExecutor(
            1, "scorer", initializer=torch.set_num_threads, initargs=(args.torch_threads,)
        )
        self._scorer = self._worker.submit(self._load).result()
        self._refreshed_s = time.monotonic()
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._ring: Ring | None = None
        self._refused_rollout = False
        for batch in (self._score_batch, self._events_batch):
            batch.set_max_batch_size(args.max_batch_requests)
            batch.set_batch_wait_timeout_s(args.batch_wait_ms / 1000)
        self._metrics = ReplicaMetrics(self._scorer.cache, self._scorer.online)

    def _load(self) -> Scorer:
        args = self._args
        device = "cuda" if args.num_gpus else "cpu"
        assert args.sequences  # build_app found it
        return Scorer(
            args.checkpoint,
            args.sequences,
            args.cache_bytes,
            args.items,
            args.sequences_version,
            device,
            args.event_limits,
        )

    @serve.batch
    async def _score_batch(self, requests: list[ScoreRequest]) -> list[tuple[ScoreResult | UserError, str]]:
        """Each outcome with the version of the model that it is of."""
        return await self._in_worker(self._score, requests)

    @serve.batch
    async def _events_batch(self, requests: list[EventsRequest]) -> list[EventsResult | UserError]:
        return await self._in_worker(lambda: self._scorer.add_events(requests))

    def _score(self, requests: Sequence[ScoreRequest]) -> list[tuple[ScoreResult | UserError, str]]:
        version = self._scorer.info.model_version
        return [(outcome, version) for outcome in self._scorer.score(requests)]

    async def _in_worker(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    # -- roll-out -----------------------------------------------------------------------------------------------------

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve with a new `user_config`: goes over to its `checkpoint` between two batches, states become misses.

        A checkpoint that cannot serve is refused: the model that serves goes on, and /v1/model says so.
        """
        try:
            checkpoint = Rollout.model_validate(user_config).checkpoint
            loaded = await asyncio.to_thread(self._scorer.load_checkpoint, checkpoint)
        except Exception as error:  # whatever it is, raising would end this replica and its states
            self._refused_rollout = True
            _logger.error("roll-out refused, model %s serves on: %s", self._scorer.info.model_version, one_line(error))
            return
        await self._in_worker(self._scorer.adopt, *loaded)
        self._refused_rollout = False
        _logger.info("model: now %s", self._scorer.info.model_version)

    # -- upkeep -------------------------------------------------------------------------------------------------------

    async def check_health(self) -> None:
        """Called by Serve: a replica whose worker hangs is replaced. Now and then looks for newer sequences and at the ring."""
        is_due = time.monotonic() - self._refreshed_s >= self._args.refresh_s
        if self._ring is None or is_due:
            self._upkeep = asyncio.create_task(self._look_at_ring())
        if is_due:
            self._refreshed_s = time.monotonic()
        await self._in_worker(self._refresh if is_due else lambda: None)

    def _refresh(self) -> None:
        try:
            if self._scorer.refresh():
                _logger.info("sequences: now at version %s", self._scorer.history.version_id)
        except Exception:
            _logger.exception(
                "sequences: cannot look for a newer version; version %s serves on", self._scorer.history.version_id
            )

    async def _look_at_ring(self) -> None:
        try:
            names = await self._everywhere("replica_id")
        except (RayServeException, TimeoutError):
            return  # so the ring stays what it was: it only serves a count
        self._ring = Ring({name for name in names if isinstance(name, str)} | {self._replica})

    async def _everywhere(self, method: str, *args: Any) -> list[Any]:
        """What each replica returns, or the error instead, of all that run as far as this one has been told."""
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        return await handle.broadcast(method, *args).results_async(timeout_s=_RING_WITHIN_S, return_exceptions=True)

    async def replica_id(self) -> str:
        """Called by other replicas."""
        return self._replica

    async def forget(self, user_id: int | str) -> bool:
        """Called by other replicas: drops what this one holds of the user; whether it held anything."""
        return await self._in_worker(self._scorer.forget, user_id)

    # -- scores -------------------------------------------------------------------------------------------------------

    @api.post(
        "/v1/score",
        openapi_extra=about_call(SESSION_HEADER, TIMEOUT_HEADER, body=body_of(ScoreBody, ARROW)),
        responses={**responds(ScoreAnswer, ARROW), **errors(413, 415, 503)},
    )
    async def score(self, request: Request) -> Response:
        """Scores candidates for one user."""
        return await self._answer(request, "score", self._answer_score)

    async def _answer_score(self, request: Request) -> Answer:
        self._count_affinity(request)
        content_type = _content_type_of(request, JSON, ARROW)
        parse = parse_arrow_body if content_type == ARROW else parse_score_body
        asked = parse(await self._body(request), self._args.limits)
        outcome, version = await self._score_batch(asked.request)
        if isinstance(outcome, UserError):
            raise outcome
        if content_type == ARROW:
            return arrow_answer(asked, outcome, version), ARROW
        return as_json(score_answer(asked, outcome, version)), JSON

    @api.post(
        "/v1/score:batch",
        openapi_extra=about_call(TIMEOUT_HEADER, body=body_of(ScoreBatchBody)),
        responses={**responds(ScoreBatchAnswer), **errors(413, 415)},
    )
    async def score_batch(self, request: Request) -> Response:
        """Scores candidates for several users; a request that cannot be answered has its error in its place."""
        return await self._answer(request, "score:batch", self._answer_batch)

    async def _answer_batch(self, request: Request) -> Answer:
        _content_type_of(request, JSON)
        several = parse_score_batch_body(await self._body(request), self._args.limits)
        outcomes = await asyncio.gather(*(self._score_batch(asked.request) for asked in several))
        results = [
            {"error": _reason(outcome), "status": _status(outcome)}
            if isinstance(outcome, UserError)
            else score_answer(asked, outcome, version)
            for asked, (outcome, version) in zip(several, outcomes, strict=True)
        ]
        return as_json({"results": results}), JSON

    # -- users --------------------------------------------------------------------------------------------------------

    @api.post(
        "/v1/events",
        openapi_extra=about_call(SESSION_HEADER, TIMEOUT_HEADER, body=body_of(EventsBody)),
        responses={**responds(EventsAnswer), **errors(413, 415)},
    )
    async def events(self, request: Request) -> Response:
        """Takes in a user's newest events. They are known to the replica that answers, until the table has them."""
        return await self._answer(request, "events", self._answer_events)

    async def _answer_events(self, request: Request) -> Answer:
        _content_type_of(request, JSON)
        self._count_affinity(request)
        outcome = await self._events_batch(parse_events_body(await self._body(request), self._args.limits))
        if isinstance(outcome, UserError):
            raise outcome
        return as_json(events_answer(outcome)), JSON

    @api.delete(
        "/v1/users/{user_id:path}",
        openapi_extra=about_call(TIMEOUT_HEADER),
        responses={**responds(ForgetAnswer), **errors(503)},
    )
    async def forget_user(self, request: Request, user_id: str) -> Response:
        """Drops states and online events of the user on every replica that runs; the sequence table is not touched."""
        return await self._answer(request, "users", lambda _: self._answer_forget(user_id))

    async def _answer_forget(self, text: str) -> Answer:
        user_id = _id_of(text, self._scorer.info.schema.user_id)
        held = await self.forget(user_id)
        try:
            others = await self._everywhere("forget", user_id)
        except (RayServeException, TimeoutError) as error:
            others = [error]
        if any(isinstance(outcome, BaseException) for outcome in others):
            raise BodyError(503, "not every replica has answered: send the same again")
        return as_json({"replicas": len(others), "held": sum([held, *others])}), JSON

    # -- what is served -----------------------------------------------------------------------------------------------

    @api.get("/v1/model", openapi_extra=about_call(SESSION_HEADER, TIMEOUT_HEADER), responses=errors())
    async def model(self, request: Request) -> Response:
        """The model that answers, and what it reads."""
        return await self._answer(request, "model", self._answer_model)

    async def _answer_model(self, _: Request) -> Answer:
        info = self._scorer.info
        about = {
            "model_version": info.model_version,
            "refused_rollout": self._refused_rollout,
            "schema_hash": info.schema.hash(),
            "encoding": info.model.encoding,
            "tasks": [task.model_dump(include={"name", "kind"}) for task in info.tasks],
            "item_features": list(info.schema.features_of("item")),
            "event_fields": [field.name for field in info.schema.event_fields()],
            "history_events": info.model.history_events,
            "sequences_version": self._scorer.history.version_id,
        }
        return as_json(about), JSON

    @api.get("/v1/stats", openapi_extra=about_call(SESSION_HEADER, TIMEOUT_HEADER), responses=errors())
    async def stats(self, request: Request) -> Response:
        """What this replica holds and has done."""
        return await self._answer(request, "stats", self._answer_stats)

    async def _answer_stats(self, _: Request) -> Answer:
        cache, online = self._scorer.cache, self._scorer.online
        states = {"states": len(cache), "bytes": cache.num_bytes, "budget_bytes": cache.budget_bytes}
        events = {"users": len(online), "bytes": online.num_bytes, "budget_bytes": self._args.events_bytes}
        about = {
            "replica": self._replica,
            "cache": {**cache.counters.as_dict(), **states},
            "online_events": {**online.counters.as_dict(), **events},
            "lost_affinity": dict(self._metrics.lost_affinity),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        return as_json(about), JSON

    @api.get("/healthz")
    async def healthz(self) -> Response:
        """The process answers."""
        return self._response(as_json({"status": "ok"}))

    @api.get("/readyz", responses={503: errors(503)[503]})
    async def readyz(self) -> Response:
        """The scorer answers."""
        try:
            await asyncio.wait_for(self._in_worker(lambda: None), _READY_WITHIN_S)
        except TimeoutError:
            return self._response(as_json({"error": "the scorer is busy or stuck: try another replica"}), 503)
        return self._response(as_json({"status": "ready"}))

    # -- what all have in common --------------------------------------------------------------------------------------

    async def _answer(self, request: Request, route: str, work: Callable[[Request], Awaitable[Answer]]) -> Response:
        """The work's answer, or what went wrong: a line and a status, and never a value that was sent."""
        started, media_type, headers = time.perf_counter(), JSON, {}
        try:
            self._check_token(request)
            async with asyncio.timeout(self._time_left_s(request)):
                content, media_type = await work(request)
            status = 200
        except TimeoutError:
            content, status = as_json({"error": "not answered in time: allow more, or send fewer candidates"}), 504
        except UserError as error:
            content, status = as_json({"error": _reason(error)}), _status(error)
            if status == 503:
                headers["retry-after"] = str(RETRY_AFTER_S)
            if status == 401:
                headers["www-authenticate"] = "Bearer"
        self._metrics.record(route, (time.perf_counter() - started) * 1000, status)
        return self._response(content, status, media_type, headers)

    def _check_token(self, request: Request) -> None:
        """Digests are compared, in constant time, so that neither content nor length of the token shows."""
        if self._token_digest is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        if not hmac.compare_digest(digest, self._token_digest) or scheme.lower() != "bearer":
            raise BodyError(401, "authorization: send this service's token as `Authorization: Bearer TOKEN`")

    def _time_left_s(self, request: Request) -> float:
        """The time that the caller gives, or the longest allowed."""
        given = request.headers.get(TIMEOUT_HEADER)
        if given is None:
            return self._args.timeout_s
        if not (given.isascii() and given.isdigit() and 0 < int(given) < 10**9):
            raise BodyError(422, f"{TIMEOUT_HEADER}: expected a positive integer, in milliseconds")
        return min(int(given) / 1000, self._args.timeout_s)

    def _count_affinity(self, request: Request) -> None:
        """A request without a session goes anywhere; one of a session that is another replica's found that one full or gone."""
        session = request.headers.get(SESSION_HEADER)
        if not session:
            self._metrics.lost_affinity["no_session"] += 1
        elif self._ring and self._ring.owner(session) != self._replica:
            self._metrics.lost_affinity["other_replica"] += 1

    async def _body(self, request: Request) -> bytes:
        """The whole body; BodyError as soon as it is too large or when its sender has gone."""
        body, limit = bytearray(), self._args.max_body_bytes
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise BodyError(413, f"body: at most {limit} bytes: send fewer candidates in a request")
        except ClientDisconnect:
            raise BodyError(400, "body: the connection closed before its end") from None
        return bytes(body)

    def _response(
        self, content: bytes, status: int = 200, media_type: str = JSON, headers: dict[str, str] | None = None
    ) -> Response:
        return Response(content, status, {"x-replica": self._replica, **(headers or {})}, media_type)
