"""What a replica asks of the others of its deployment."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from longer.errors import one_line

OWNER_WITHIN_S = 1.0
_WITHIN_S = 5.0
_logger = logging.getLogger("ray.serve")


class Peers:
    """All replicas that run as far as this one has been told, itself included."""

    def __init__(self) -> None:
        self._handle: DeploymentHandle | None = None

    async def ask(self, method: Callable[..., Any], *args: Any) -> list[Any]:
        """What each replica's method of that name returns, or the error instead, a TimeoutError where it is silent; one error if
        none could be asked."""
        asked = self._deployment().broadcast(method.__name__, *args)
        try:  # `results_async` would have nobody's answer where one is silent
            replies = await asyncio.wait_for(asked._fetch_replica_results_async(), _WITHIN_S)
        except (RayServeException, TimeoutError) as error:
            return [error]
        answers = (asyncio.wait_for(reply.get_async(), _WITHIN_S) for reply in replies)
        return await asyncio.gather(*answers, return_exceptions=True)

    async def ask_owner(
        self, session: str, method: Callable[..., Any], *args: Any, within_s: float = OWNER_WITHIN_S
    ) -> Any:
        """What the method returns on the replica whose session it is; None if that one is full, gone or silent."""
        call = self._deployment().options(method_name=method.__name__, session_id=session).remote(*args)
        try:
            return await asyncio.wait_for(call, within_s)
        except asyncio.CancelledError:
            call.cancel()
            raise
        except (RayServeException, RayError, TimeoutError) as error:
            call.cancel()  # nobody waits for it any more
            _logger.warning("the replica whose user it is did not answer: %s", one_line(error))
            return None

    def _deployment(self) -> DeploymentHandle:
        if self._handle is None:  # not made when this one starts: there is nothing to ask yet
            context = serve.get_replica_context()
            self._handle = serve.get_deployment_handle(context.deployment, context.app_name)
        return self._handle
