"""One scorer with its cache behind HTTP. Everything that touches the scorer runs in its one worker thread."""

import asyncio
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
from ray.serve.handle import DeploymentHandle

from longer.errors import UserError, one_line
from longer.serving.scorer import EventsRequest, EventsResult, Scorer, ScoreRequest, ScoreResult
from serve_apps.access import SESSION_HEADER, TIMEOUT_HEADER, Gate, content_type_of, id_of, reason_of, status_of
from serve_apps.affinity import Affinity
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

RETRY_AFTER_S = 1
_READY_WITHIN_S = 2.0
_RING_WITHIN_S = 5.0
_logger = logging.getLogger("ray.serve")


class _Api(FastAPI):
    def openapi(self) -> dict[str, Any]:
        return with_security(super().openapi())


api = _Api(title="longer scoring", version="1")

Answer = tuple[bytes, str]
JSON = "application/json"


@serve.deployment
@serve.ingress(api)
class ScoringReplica:
    """Answers as `serve_apps/scoring.py` says."""

    def __init__(self, args: ScoringArgs) -> None:
        self._args = args
        self._gate = Gate(args.token(), args.timeout_s, args.max_body_bytes)
        self._worker = ThreadPoolExecutor(
            1, "scorer", initializer=torch.set_num_threads, initargs=(args.torch_threads,)
        )
        self._scorer = self._worker.submit(self._load).result()
        self._refreshed_s = time.monotonic()
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._affinity = Affinity(self._replica)
        self._refused_rollout = False
        self._peers: DeploymentHandle | None = None
        for batch in (self._score_batch, self._events_batch):
            batch.set_max_batch_size(args.max_batch_requests)
            batch.set_batch_wait_timeout_s(args.batch_wait_ms / 1000)
        self._metrics = ReplicaMetrics(self._scorer.cache, self._scorer.online, self._affinity.lost)

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
        if self._affinity.ring is None or is_due:
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
        self._affinity.see(name for name in names if isinstance(name, str))

    async def _everywhere(self, method: str, *args: Any) -> list[Any]:
        """What each replica returns, or the error instead, of all that run as far as this one has been told."""
        if self._peers is None:  # not when this one starts: there is nothing to ask yet
            context = serve.get_replica_context()
            self._peers = serve.get_deployment_handle(context.deployment, context.app_name)
        return await self._peers.broadcast(method, *args).results_async(
            timeout_s=_RING_WITHIN_S, return_exceptions=True
        )

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
        self._affinity.count(request.headers.get(SESSION_HEADER))
        content_type = content_type_of(request, JSON, ARROW)
        parse = parse_arrow_body if content_type == ARROW else parse_score_body
        asked = parse(await self._gate.body(request), self._args.limits)
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
        content_type_of(request, JSON)
        several = parse_score_batch_body(await self._gate.body(request), self._args.limits)
        outcomes = await asyncio.gather(*(self._score_batch(asked.request) for asked in several))
        results = [
            {"error": reason_of(outcome), "status": status_of(outcome)}
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
        content_type_of(request, JSON)
        self._affinity.count(request.headers.get(SESSION_HEADER))
        outcome = await self._events_batch(parse_events_body(await self._gate.body(request), self._args.limits))
        if isinstance(outcome, UserError):
            raise outcome
        return as_json(events_answer(outcome)), JSON

    @api.delete(
        "/v1/users/{user_id:any_text}",
        openapi_extra=about_call(TIMEOUT_HEADER),
        responses={**responds(ForgetAnswer), **errors(503)},
    )
    async def forget_user(self, request: Request, user_id: str) -> Response:
        """Drops states and online events of the user on every replica that runs; the sequence table is not touched."""
        return await self._answer(request, "users", lambda _: self._answer_forget(user_id))

    async def _answer_forget(self, text: str) -> Answer:
        user_id = id_of(text, self._scorer.info.schema.user_id)
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
            "lost_affinity": dict(self._affinity.lost),
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
            self._gate.check_token(request)
            async with asyncio.timeout(self._gate.time_left_s(request)):
                content, media_type = await work(request)
            status = 200
        except TimeoutError:
            content, status = as_json({"error": "not answered in time: allow more, or send fewer candidates"}), 504
        except UserError as error:
            content, status = as_json({"error": reason_of(error)}), status_of(error)
            if status == 503:
                headers["retry-after"] = str(RETRY_AFTER_S)
            if status == 401:
                headers["www-authenticate"] = "Bearer"
        self._metrics.record(route, (time.perf_counter() - started) * 1000, status)
        return self._response(content, status, media_type, headers)

    def _response(
        self, content: bytes, status: int = 200, media_type: str = JSON, headers: dict[str, str] | None = None
    ) -> Response:
        return Response(content, status, {"x-replica": self._replica, **(headers or {})}, media_type)
