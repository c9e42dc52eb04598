"""The service over HTTP: routes, bodies and answers."""

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from fastapi_offline import FastAPIOffline
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from longer.errors import UserError
from serve_apps import status_page
from serve_apps.access import SESSION_HEADER, TIMEOUT_HEADER, content_type_of, id_of, reason_of, status_of
from serve_apps.access_log import Call
from serve_apps.account import in_short
from serve_apps.arguments import ScoringArgs
from serve_apps.arrow_body import ARROW, arrow_answer, parse_arrow_body
from serve_apps.bodies import (
    EventsAnswer,
    EventsBody,
    ForgetAnswer,
    ReplicasAnswer,
    ScoreAnswer,
    ScoreBatchAnswer,
    ScoreBatchBody,
    ScoreBody,
)
from serve_apps.bounded_http import IS_ACCEPTED
from serve_apps.desk import Refusal
from serve_apps.openapi import about_call, body_of, errors, responds, with_security
from serve_apps.protocol import (
    as_json,
    events_answer,
    parse_events_body,
    parse_score_batch_body,
    parse_score_body,
    score_answer,
)
from serve_apps.rpc import RpcService
from serve_apps.service import RETRY_AFTER_S

_READY_WITHIN_S = 2.0


api = FastAPIOffline(title="longer scoring", version="1", redoc_url=None)  # /docs loads nothing from elsewhere
_openapi = api.openapi
api.openapi = lambda: with_security(_openapi())  # type: ignore[method-assign]

Answer = tuple[bytes, str]
JSON = "application/json"


@serve.deployment
@serve.ingress(api)
class ScoringReplica(RpcService):
    """Answers, over gRPC too, as `serve_apps/scoring.py` says."""

    app: ASGIApp  # which Serve makes of `api`

    def __init__(self, args: ScoringArgs) -> None:
        super().__init__(args)
        if self._direct:
            self._direct.serve(self._frequent_first, ends_within_s=args.timeout_s)

    async def _frequent_first(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What `api` does; for what is asked all the time without its routing, which takes as long as a body and its answer."""
        if scope["type"] == "http" and (scope["method"], scope["path"]) == ("POST", "/v1/score"):
            answer = await self.score(Request(scope, receive))
            await answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    # -- scores -------------------------------------------------------------------------------------------------------

    @api.post(
        "/v1/score",
        openapi_extra=about_call(SESSION_HEADER, TIMEOUT_HEADER, body=body_of(ScoreBody, ARROW)),
        responses={**responds(ScoreAnswer, ARROW), **errors(408, 413, 415, 503)},
    )
    async def score(self, request: Request) -> Response:
        """Scores candidates for one user."""
        return await self._answer(request, "score", self._answer_score)

    async def _answer_score(self, request: Request, call: Call) -> Answer:
        content_type = content_type_of(request, JSON, ARROW)
        parse = parse_arrow_body if content_type == ARROW else parse_score_body
        asked = parse(await self._gate.body(request), self._args.limits)
        result, version = await self.score_one(asked, request.headers.get(SESSION_HEADER), call)
        if content_type == ARROW:
            return arrow_answer(asked, result, version), ARROW
        return as_json(score_answer(asked, result, version)), JSON

    @api.post(
        "/v1/score:batch",
        openapi_extra=about_call(TIMEOUT_HEADER, body=body_of(ScoreBatchBody)),
        responses={**responds(ScoreBatchAnswer), **errors(408, 413, 415)},
    )
    async def score_batch(self, request: Request) -> Response:
        """Scores candidates for several users; a request that cannot be answered has its error in its place."""
        return await self._answer(request, "score:batch", self._answer_batch)

    async def _answer_batch(self, request: Request, call: Call) -> Answer:
        content_type_of(request, JSON)
        several = parse_score_batch_body(await self._gate.body(request), self._args.limits)
        results = [
            {"error": reason_of(outcome), "status": status_of(outcome)}
            if isinstance(outcome, UserError)
            else score_answer(asked, outcome, version)
            for asked, (outcome, version) in zip(several, await self.score_several(several, call), strict=True)
        ]
        return as_json({"results": results}), JSON

    # -- users --------------------------------------------------------------------------------------------------------

    @api.post(
        "/v1/events",
        openapi_extra=about_call(SESSION_HEADER, TIMEOUT_HEADER, body=body_of(EventsBody)),
        responses={**responds(EventsAnswer), **errors(408, 413, 415)},
    )
    async def events(self, request: Request) -> Response:
        """Takes in a user's newest events. They are known to the replica that is named in the answer, until the table has them."""
        return await self._answer(request, "events", self._answer_events)

    async def _answer_events(self, request: Request, call: Call) -> Answer:
        content_type_of(request, JSON)
        sent = parse_events_body(await self._gate.body(request), self._args.limits)
        result, replica = await self.take_in(sent, request.headers.get(SESSION_HEADER), call)
        return as_json(events_answer(result, replica)), JSON

    @api.delete(
        "/v1/users/{user_id:any_text}",
        openapi_extra=about_call(TIMEOUT_HEADER),
        responses={**responds(ForgetAnswer), **errors(503)},
    )
    async def forget_user(self, request: Request, user_id: str) -> Response:
        """Drops states and online events of the user on every replica that runs; the sequence table is not touched."""
        return await self._answer(request, "users", lambda _request, _call: self._answer_forget(user_id))

    async def _answer_forget(self, text: str) -> Answer:
        num_replicas, num_held = await self.forget_everywhere(id_of(text, self._scorer.info.schema.user_id))
        return as_json({"replicas": num_replicas, "held": num_held}), JSON

    # -- what is served -----------------------------------------------------------------------------------------------

    @api.get("/v1/model", openapi_extra=about_call(SESSION_HEADER, TIMEOUT_HEADER), responses=errors())
    async def model(self, request: Request) -> Response:
        """The model that answers, and what it reads."""
        return await self._answer(request, "model", self._answer_model)

    async def _answer_model(self, _request: Request, _call: Call) -> Answer:
        return as_json(self.about_model()), JSON

    @api.get("/v1/stats", openapi_extra=about_call(SESSION_HEADER, TIMEOUT_HEADER), responses=errors())
    async def stats(self, request: Request) -> Response:
        """What this replica holds and has done."""
        return await self._answer(request, "stats", self._answer_stats)

    async def _answer_stats(self, _request: Request, _call: Call) -> Answer:
        return as_json(in_short(await self.account())), JSON

    @api.get("/v1/status", openapi_extra=about_call(SESSION_HEADER, TIMEOUT_HEADER), responses=errors())
    async def service_status(self, request: Request) -> Response:
        """What all replicas hold, and how they did in the last minute."""
        return await self._answer(request, "status", self._answer_status)

    async def _answer_status(self, _request: Request, _call: Call) -> Answer:
        return as_json(await self.status()), JSON

    @api.get(
        "/v1/replicas", openapi_extra=about_call(TIMEOUT_HEADER), responses={**responds(ReplicasAnswer), **errors()}
    )
    async def replicas(self, request: Request) -> Response:
        """The replicas that run, and where each answers itself: for clients that send a user's calls straight to hers."""
        return await self._answer(request, "replicas", self._answer_replicas)

    async def _answer_replicas(self, _request: Request, _call: Call) -> Answer:
        return as_json({"urls": await self.replica_urls()}), JSON

    @api.get("/", include_in_schema=False)
    async def page(self) -> Response:
        """The status page, which holds no data itself."""
        return self._response(status_page.PAGE, "text/html; charset=utf-8", headers=status_page.HEADERS)

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
            return self._response(as_json({"error": "the scorer is busy or stuck: try another replica"}), status=503)
        return self._response(as_json({"status": "ready"}))

    # -- what all have in common --------------------------------------------------------------------------------------

    async def _answer(
        self, request: Request, route: str, work: Callable[[Request, Call], Awaitable[Answer]]
    ) -> Response:
        async def answer(call: Call) -> Answer:
            content = await work(request, call)
            call.ends("answer")
            return content

        outcome = await self._desk.attempt(route, request.headers, answer)
        if not isinstance(outcome, Refusal):
            request.scope.setdefault("state", {})[IS_ACCEPTED] = True
            return self._response(*outcome)
        stranger = {"www-authenticate": "Bearer", "connection": "close"}  # who holds no connection meant for callers
        headers = {503: {"retry-after": str(RETRY_AFTER_S)}, 401: stranger}
        return self._response(as_json({"error": outcome.reason}), JSON, outcome.status, headers.get(outcome.status))

    def _response(
        self, content: bytes, media_type: str = JSON, status: int = 200, headers: dict[str, str] | None = None
    ) -> Response:
        return Response(content, status, {"x-replica": self._replica, **(headers or {})}, media_type)
