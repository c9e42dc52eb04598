"""Scores candidates over HTTP with Ray Serve:

    serve run serve_apps.scoring:build_app checkpoint=runs/quickstart/checkpoints

POST /v1/score    {"user_id", "candidates": ids or {"id", "features"}, "request_ts"?, "top_k"?} -> scores by task
GET  /v1/model    what is served          GET /v1/stats    this replica's cache
GET  /healthz     the process answers     GET /readyz      the scorer answers

Send `x-session-id: USER` (percent-encoded if not ASCII) with every request: it is hashed to a replica, so that a user's state is
found where it was left. The scorer is the ingress (a second hop would double the latency), and torch runs in one thread beside
the event loop.
"""

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import ray
import torch
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.metrics import Counter, Gauge, Histogram
from ray.serve.schema import LoggingConfig
from starlette.requests import ClientDisconnect

from longer.config import RaySettings
from longer.data.items import items_version
from longer.data.tables import open_version
from longer.errors import StorageError, UserError
from longer.serving.scorer import Scorer, ScoreRequest, ScoreResult
from longer.storage import Table
from longer.training.checkpoints import load_model
from serve_apps.protocol import BodyError, ScoreBody, parse_score_body, score_response

_LATENCY_EDGES_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
_READY_WITHIN_S = 2.0
_HEALTH_CHECK_S = 10.0
_logger = logging.getLogger("ray.serve")

api = FastAPI(title="longer scoring", version="1")


class ScoringArgs(BaseModel):
    """Arguments of the application; on the command line as NAME=VALUE, in a Serve config under `args`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str = Field(description="A checkpoint, or the checkpoints table: then its served version.")
    sequences: str | None = Field(
        None, description="Path of the sequence table; null: tables/sequences beside checkpoints."
    )
    sequences_version: str | None = Field(None, description="Version to stay at; null follows the one served.")
    items: str | None = Field(None, description="Path of the item catalogue; null: tables/items beside checkpoints.")
    num_replicas: int = Field(1, ge=1, description="Fewest replicas.")
    max_replicas: int = Field(1, ge=1, description="Most replicas that autoscaling may reach.")
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="Requests in a replica above which autoscaling adds one; null: max_batch_requests."
    )
    upscale_delay_s: float = Field(30, ge=0, description="Time above the target before a replica is added.")
    downscale_delay_s: float = Field(
        1800, ge=0, description="Quiet time before a replica goes, and its states with it."
    )
    cache_bytes: int = Field(256 << 20, ge=0, description="Budget of a replica's user states, in bytes.")
    max_candidates: int = Field(2_000, ge=1, description="Most candidates of one request.")
    max_body_bytes: int = Field(1 << 20, ge=1, description="Largest body of a request, in bytes.")
    max_batch_requests: int = Field(16, ge=1, description="Requests scored together.")
    batch_wait_ms: float = Field(1.0, ge=0, description="How long the first request of a batch waits for company.")
    refresh_s: float = Field(60, gt=0, description="Seconds between looks for a newer version of the sequence table.")
    num_cpus: float = Field(1, ge=0, description="CPUs that Ray reserves for a replica.")
    num_gpus: float = Field(0, ge=0, description="GPUs of a replica; 0 scores on the CPU.")
    torch_threads: int = Field(1, ge=1, description="Threads of one torch operation.")
    pool_label: str | None = Field(
        None, description="Label whose value, 'gpu' or 'cpu', says which nodes are for these replicas; null: any."
    )

    @model_validator(mode="after")
    def _replicas_fit(self) -> Self:
        if self.num_replicas > self.max_replicas:
            raise ValueError(
                f"num_replicas={self.num_replicas} exceeds max_replicas={self.max_replicas}: raise the latter"
            )
        return self


# Above the class that uses them: Serve pickles the application's functions, with their globals, as it decorates the class.
class _Metrics:
    """The replica's Prometheus metrics; the scorer's counters are exported as increments."""

    def __init__(self, scorer: Scorer) -> None:
        self._cache, self._exported = scorer.cache, scorer.cache.counters.as_dict()
        self._events = Counter("longer_user_states", "Requests by what the cache held, and states dropped.", ("event",))
        self._requests = Counter("longer_score_requests", "Requests by HTTP status.", ("status",))
        self._bytes = Gauge("longer_user_state_bytes", "Bytes of user states held.")
        self._latency = Histogram(
            "longer_score_latency_ms", "Milliseconds in the replica.", boundaries=_LATENCY_EDGES_MS
        )

    def record(self, latency_ms: float, status: int) -> None:
        self._latency.observe(latency_ms)
        self._requests.inc(tags={"status": str(status)})
        self._bytes.set(self._cache.num_bytes)
        counters = self._cache.counters.as_dict()
        for event, count in counters.items():
            if count > self._exported[event]:
                self._events.inc(count - self._exported[event], tags={"event": event})
        self._exported = counters


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()


@serve.deployment
@serve.ingress(api)
class ScoringReplica:
    """One scorer with its cache behind HTTP. Everything that touches the scorer runs in its one worker thread."""

    def __init__(self, args: ScoringArgs) -> None:
        self._args = args
        self._worker = ThreadPoolExecutor(
            1, "scorer", initializer=torch.set_num_threads, initargs=(args.torch_threads,)
        )
        self._scorer = self._worker.submit(self._load).result()
        self._refreshed_s = time.monotonic()
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._score_batch.set_max_batch_size(args.max_batch_requests)
        self._score_batch.set_batch_wait_timeout_s(args.batch_wait_ms / 1000)
        self._metrics = _Metrics(self._scorer)

    def _load(self) -> Scorer:
        args = self._args
        device = "cuda" if args.num_gpus else "cpu"
        assert args.sequences  # build_app found it
        return Scorer(args.checkpoint, args.sequences, args.cache_bytes, args.items, args.sequences_version, device)

    @serve.batch
    async def _score_batch(self, requests: list[ScoreRequest]) -> list[ScoreResult | UserError]:
        return await self._in_worker(lambda: self._scorer.score(requests))

    async def _in_worker(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function)

    async def check_health(self) -> None:
        """Called by Serve: a replica whose worker hangs is replaced. Also looks for newer sequences now and then."""
        await self._in_worker(self._refresh)

    def _refresh(self) -> None:
        if time.monotonic() - self._refreshed_s < self._args.refresh_s:
            return
        self._refreshed_s = time.monotonic()
        try:
            if self._scorer.refresh():
                _logger.info("sequences: now at version %s", self._scorer.history.version_id)
        except Exception:
            _logger.exception(
                "sequences: cannot look for a newer version; version %s serves on", self._scorer.history.version_id
            )

    @api.post(
        "/v1/score",
        openapi_extra={"requestBody": {"content": {"application/json": {"schema": ScoreBody.model_json_schema()}}}},
    )
    async def score(self, request: Request) -> Response:
        started = time.perf_counter()
        try:
            asked, top_k = parse_score_body(await self._body(request), self._args.max_candidates)
            outcome: ScoreResult | UserError = await self._score_batch(asked)
            if isinstance(outcome, UserError):
                raise outcome
            content, status = score_response(asked, outcome, top_k, self._scorer.info.model_version), 200
        except StorageError as error:
            _logger.error("%s", error)
            content, status = _json({"error": "the sequence table cannot be read at the moment: try again later"}), 503
        except UserError as error:
            content, status = _json({"error": str(error)}), error.status if isinstance(error, BodyError) else 422
        self._metrics.record((time.perf_counter() - started) * 1000, status)
        return self._response(content, status)

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

    @api.get("/v1/model")
    async def model(self) -> Response:
        info = self._scorer.info
        return self._response(
            _json(
                {
                    "model_version": info.model_version,
                    "schema_hash": info.schema.hash(),
                    "encoding": info.model.encoding,
                    "tasks": [task.model_dump(include={"name", "kind"}) for task in info.tasks],
                    "item_features": list(info.schema.features_of("item")),
                    "history_events": info.model.history_events,
                    "sequences_version": self._scorer.history.version_id,
                }
            )
        )

    @api.get("/v1/stats")
    async def stats(self) -> Response:
        cache = self._scorer.cache
        sizes = {"states": len(cache), "bytes": cache.num_bytes, "budget_bytes": cache.budget_bytes}
        return self._response(_json({"replica": self._replica, "cache": {**cache.counters.as_dict(), **sizes}}))

    @api.get("/healthz")
    async def healthz(self) -> Response:
        return self._response(_json({"status": "ok"}))

    @api.get("/readyz")
    async def readyz(self) -> Response:
        try:
            await asyncio.wait_for(self._in_worker(lambda: None), _READY_WITHIN_S)
        except TimeoutError:
            return self._response(_json({"error": "the scorer is busy or stuck: try another replica"}), 503)
        return self._response(_json({"status": "ready"}))

    def _response(self, content: bytes, status: int = 200) -> Response:
        return Response(content, status, {"x-replica": self._replica}, "application/json")


def _resolved(args: ScoringArgs) -> ScoringArgs:
    """The arguments with every path found and checked: a mistake is told at once, before any replica starts.

    Without the catalogue, candidates given by id would silently lose their features and get other scores.
    """
    served = Table(args.checkpoint).current()
    checkpoint = served.path if served else args.checkpoint
    info = load_model(checkpoint)[1]
    root = args.checkpoint.rstrip("/").rpartition("checkpoints")[0] or "./"
    sequences = args.sequences or f"{root}tables/sequences"
    items = (args.items or f"{root}tables/items") if info.schema.features_of("item") else None
    version = open_version(sequences, info.schema, args.sequences_version, "jobs.build_sequences")
    if items:
        open_version(items, info.schema, items_version(version.id, info.schema), "jobs.build_sequences")
    kept, needed = version.manifest["settings"]["keep_events"], info.model.windows.max_history_events
    if kept < needed:
        raise UserError(
            f"{version.path}: keeps {kept} events a user, but the model's history window needs {needed}: "
            "raise sequences.keep_events and build it again"
        )
    return args.model_copy(update={"checkpoint": checkpoint, "sequences": sequences, "items": items})


def build_app(args: ScoringArgs) -> serve.Application:
    """The Serve application; replicas come and go slowly, since each change remaps users away from their states.

    The checkpoint is chosen here, once, so that all replicas serve the same one.
    """
    try:
        args = _resolved(args)
    except UserError as error:
        if ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
            raise  # `serve deploy` builds in a task, whose error is reported with the application's status
        print(error, file=sys.stderr)
        sys.exit(2)  # `serve run` would show a traceback
    return ScoringReplica.options(
        name="scoring",
        ray_actor_options={
            "num_cpus": args.num_cpus,
            "num_gpus": args.num_gpus,
            "label_selector": RaySettings(pool_label=args.pool_label).place(args.num_gpus),
        },
        max_ongoing_requests=4 * args.max_batch_requests,
        autoscaling_config=AutoscalingConfig(
            min_replicas=args.num_replicas,
            max_replicas=args.max_replicas,
            target_ongoing_requests=args.target_ongoing_requests or args.max_batch_requests,
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
            request_router_kwargs={"num_virtual_nodes": 100, "num_fallback_replicas": 2},
        ),
        health_check_period_s=min(_HEALTH_CHECK_S, args.refresh_s),  # which is when a replica looks for newer sequences
        logging_config=LoggingConfig(enable_access_log=False),
    ).bind(args)
