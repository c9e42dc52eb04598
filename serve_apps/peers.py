"""What a replica asks of the others of its deployment."""

from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

_WITHIN_S = 5.0


class Peers:
    """All replicas that run as far as this one has been told, itself included."""

    def __init__(self) -> None:
        self._handle: DeploymentHandle | None = None

    async def ask(self, method: Callable[..., Any], *args: Any) -> list[Any]:
        """What each replica's method of that name returns, or the error instead; one error if none could be asked."""
        if self._handle is None:  # not when this one starts: there is nothing to ask yet
            context = serve.get_replica_context()
            self._handle = serve.get_deployment_handle(context.deployment, context.app_name)
        asked = self._handle.broadcast(method.__name__, *args)
        try:
            return await asked.results_async(timeout_s=_WITHIN_S, return_exceptions=True)
        except (RayServeException, TimeoutError) as error:
            return [error]
