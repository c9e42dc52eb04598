"""The service over gRPC, through Serve's gRPC proxy: `serve_apps/grpc/scoring.proto` says what is called and answered.

The generated code asks for a protobuf as new as it was made with; it is imported by the first call, so that who speaks HTTP only
does not need it.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from ray.serve.grpc_util import RayServegRPCContext

from serve_apps.access import checked_id
from serve_apps.service import Refusal, ScoringService

_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    413: grpc.StatusCode.OUT_OF_RANGE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""By HTTP status; all other refusals are INVALID_ARGUMENT."""

Context = RayServegRPCContext


class RpcService(ScoringService):
    """Calls by their names in the .proto file."""

    async def Score(self, request: Any, grpc_context: Context) -> Any:
        from serve_apps.grpc import messages, scoring_pb2

        async def work(session: str | None, started_s: float) -> Any:
            asked = messages.parse_score(request, self._args.limits)
            return messages.score_response(asked, *await self.score_one(asked, session, started_s))

        return await self._reply("rpc Score", request, grpc_context, work, scoring_pb2.ScoreResponse)

    async def AddEvents(self, request: Any, grpc_context: Context) -> Any:
        from serve_apps.grpc import messages, scoring_pb2

        async def work(session: str | None, _: float) -> Any:
            sent = messages.parse_events(request, self._args.limits)
            return messages.events_response(await self.take_in(sent, session))

        return await self._reply("rpc AddEvents", request, grpc_context, work, scoring_pb2.AddEventsResponse)

    async def ForgetUser(self, request: Any, grpc_context: Context) -> Any:
        from serve_apps.grpc import messages, scoring_pb2

        async def work(*_: Any) -> Any:
            user_id = checked_id(messages.value_of(request.user_id), self._scorer.info.schema.user_id)
            num_replicas, num_held = await self.forget_everywhere(user_id)
            return scoring_pb2.ForgetUserResponse(replicas=num_replicas, held=num_held)

        return await self._reply("rpc ForgetUser", request, grpc_context, work, scoring_pb2.ForgetUserResponse)

    async def _reply(
        self,
        route: str,
        request: Any,
        context: Context,
        work: Callable[[str | None, float], Awaitable[Any]],
        empty: Callable[[], Any],
    ) -> Any:
        """The work's answer; or an empty one, and the status code and the reason in the context."""
        headers, started_s = dict(context.invocation_metadata()), time.perf_counter()

        async def checked() -> Any:
            self._gate.check_size(request.ByteSize())
            return await work(headers.get("session_id"), started_s)

        outcome = await self.attempt(route, headers, checked)
        if not isinstance(outcome, Refusal):
            return outcome
        context.set_code(_CODES.get(outcome.status, grpc.StatusCode.INVALID_ARGUMENT))
        context.set_details(outcome.reason)
        return empty()
