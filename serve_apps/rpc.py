"""The service over gRPC, through Serve's gRPC proxy: `platform/longer/rpc/scoring.proto` says what is called and answered.

The generated code asks for a protobuf as new as it was made with; it is imported by the first call, so that who speaks HTTP only
does not need it.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from ray.serve.grpc_util import RayServegRPCContext

from serve_apps.access import checked_id
from serve_apps.access_log import Call
from serve_apps.desk import Refusal
from serve_apps.protocol import BodyError
from serve_apps.service import ScoringService

_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    413: grpc.StatusCode.OUT_OF_RANGE,
    503: grpc.StatusCode.UNAVAILABLE,
    500: grpc.StatusCode.INTERNAL,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""By HTTP status; all other refusals are INVALID_ARGUMENT."""

Context = RayServegRPCContext


class RpcService(ScoringService):
    """Calls by their names in the .proto file; bodies come undecoded (`serve_apps/grpc_proxy.py`): their size is checked first."""

    async def Score(self, body: bytes, grpc_context: Context) -> Any:
        from longer.rpc import scoring_pb2
        from serve_apps import messages

        async def work(request: Any, session: str | None, call: Call) -> Any:
            asked = messages.parse_score(request, self._args.limits)
            response = messages.score_response(asked, *await self.score_one(asked, session, call))
            call.ends("answer")
            return response

        types = scoring_pb2.ScoreRequest, scoring_pb2.ScoreResponse
        return await self._reply("rpc Score", body, grpc_context, work, *types)

    async def ScoreBatch(self, body: bytes, grpc_context: Context) -> Any:
        from longer.rpc import scoring_pb2
        from serve_apps import messages

        async def work(request: Any, _session: str | None, call: Call) -> Any:
            several = messages.parse_score_batch(request, self._args.limits)
            outcomes = await self.score_several(several, call)
            results = [messages.score_result(asked, *one) for asked, one in zip(several, outcomes, strict=True)]
            call.ends("answer")
            return scoring_pb2.ScoreBatchResponse(results=results)

        types = scoring_pb2.ScoreBatchRequest, scoring_pb2.ScoreBatchResponse
        return await self._reply("rpc ScoreBatch", body, grpc_context, work, *types)

    async def AddEvents(self, body: bytes, grpc_context: Context) -> Any:
        from longer.rpc import scoring_pb2
        from serve_apps import messages

        async def work(request: Any, session: str | None, call: Call) -> Any:
            sent = messages.parse_events(request, self._args.limits)
            return messages.events_response(*await self.take_in(sent, session, call))

        types = scoring_pb2.AddEventsRequest, scoring_pb2.AddEventsResponse
        return await self._reply("rpc AddEvents", body, grpc_context, work, *types)

    async def ForgetUser(self, body: bytes, grpc_context: Context) -> Any:
        from longer.rpc import scoring_pb2
        from serve_apps import messages

        async def work(request: Any, *_: Any) -> Any:
            user_id = checked_id(messages.value_of(request.user_id), self._scorer.info.schema.user_id)
            num_replicas, num_held = await self.forget_everywhere(user_id)
            return scoring_pb2.ForgetUserResponse(replicas=num_replicas, held=num_held)

        types = scoring_pb2.ForgetUserRequest, scoring_pb2.ForgetUserResponse
        return await self._reply("rpc ForgetUser", body, grpc_context, work, *types)

    async def Model(self, body: bytes, grpc_context: Context) -> Any:
        from longer.rpc import scoring_pb2

        async def work(*_: Any) -> Any:
            return scoring_pb2.ModelResponse(**self.about_model())

        types = scoring_pb2.ModelRequest, scoring_pb2.ModelResponse
        return await self._reply("rpc Model", body, grpc_context, work, *types)

    async def _reply(
        self,
        route: str,
        body: bytes,
        context: Context,
        work: Callable[[Any, str | None, Call], Awaitable[Any]],
        asked: Any,
        answered: Any,
    ) -> Any:
        """The work's answer to the body, a message of type `asked`; or an empty one, and code and reason in the context."""
        headers = dict(context.invocation_metadata())

        async def checked(call: Call) -> Any:
            self._gate.check_size(len(body))
            try:
                request = asked.FromString(body)
            except DecodeError:
                raise BodyError(400, f"body: not a {asked.DESCRIPTOR.name}") from None
            return await work(request, headers.get("session_id"), call)

        outcome = await self._desk.attempt(route, headers, checked)
        if not isinstance(outcome, Refusal):
            return outcome
        context.set_code(_CODES.get(outcome.status, grpc.StatusCode.INVALID_ARGUMENT))
        context.set_details(outcome.reason)
        return answered()
