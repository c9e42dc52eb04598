"""The service at an address of each replica's own, for callers who know whose user is where (`longer.client`).

Serve's proxy is one Python process for all replicas of a node: it takes each call apart, pickles it and hands it on, body after
head. That costs a call of 500 candidates more than scoring them does, and bounds the calls a second whatever the replicas can do.
"""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import ray
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from longer.errors import UserError

_KEEP_ALIVE_S = 75
_ANY_PORT = 0


class DirectServer:
    """Listens from its start on, and answers once `serve` runs: the same calls with the same outcome as through the proxy.

    Serve does not know of them: `num_ongoing` is for its autoscaling, those above `most_ongoing` are answered 503, and `close`
    comes before the replica ends.
    """

    def __init__(self, host: str, most_ongoing: int, retry_after_s: int) -> None:
        self._most_ongoing, self._retry_after_s = most_ongoing, retry_after_s
        self.num_ongoing = 0
        try:
            is_ipv6 = ip_address(host).version == 6
            self._socket = socket.create_server(
                (host, _ANY_PORT), family=socket.AF_INET6 if is_ipv6 else socket.AF_INET
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"direct_host={host}: use an IP address of every node that runs replicas, or 0.0.0.0: {error}"
            ) from None
        shown = ray.util.get_node_ip_address() if ip_address(host).is_unspecified else host
        port = self._socket.getsockname()[1]
        self.url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    def serve(self, app: Callable[[], ASGIApp], ends_within_s: float) -> None:
        """Begins to answer, in the running event loop; `close` lets calls end for so long."""

        async def bounded(scope: Scope, receive: Receive, send: Send) -> None:
            if self.num_ongoing >= self._most_ongoing:
                headers = {"retry-after": str(self._retry_after_s)}
                answer: ASGIApp = JSONResponse({"error": "this replica has no room: try again later"}, 503, headers)
            else:
                answer = app()
            with self._counted():
                await answer(scope, receive, send)

        config = uvicorn.Config(
            bounded,
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="critical",
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(ends_within_s),
        )
        self._server = uvicorn.Server(config)
        self._serving = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._socket]))

    async def close(self) -> None:
        """Takes no more calls, and waits for those under way."""
        if self._server and self._serving:
            self._server.should_exit = True
            await self._serving

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.num_ongoing += 1
        try:
            yield
        finally:
            self.num_ongoing -= 1
