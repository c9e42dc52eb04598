"""The service at an address of each replica's own, for callers who know whose user is where (`longer.client`).

Serve's proxy is one Python process for all replicas of a node: it takes each call apart, pickles it and hands it on, body after
head. That costs a call of 500 candidates more than scoring them does, and bounds the calls a second whatever the replicas can do.
"""

import asyncio
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address

import ray
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from longer.errors import UserError
from serve_apps.bounded_http import CALL, BoundedHttp

_ANY_PORT = (0, 0)


class DirectServer:
    """Listens from its start on, at the first free one of its ports, and answers once `serve` runs: the same calls with the same
    outcome as through the proxy.

    Serve does not know of them: `num_ongoing` is for its autoscaling, those above `most_ongoing` are answered 503 and told to
    `on_refused`, and `close` comes before the replica ends.
    """

    def __init__(
        self,
        host: str,
        ports: tuple[int, int] | None,
        most_ongoing: int,
        retry_after_s: int,
        on_refused: Callable[[], None],
    ) -> None:
        self._most_ongoing, self._retry_after_s, self._on_refused = most_ongoing, retry_after_s, on_refused
        self.num_ongoing = 0
        self._socket = _listening(host, ports or _ANY_PORT)
        shown = ray.util.get_node_ip_address() if ip_address(host).is_unspecified else host
        port = self._socket.getsockname()[1]
        self.url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    def serve(self, app: ASGIApp, ends_within_s: float) -> None:
        """Begins to answer, in the running event loop; `close` lets calls end for so long."""

        async def bounded(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"][CALL] = asyncio.current_task()
            if self.num_ongoing >= self._most_ongoing:
                self._on_refused()
                headers = {"retry-after": str(self._retry_after_s)}
                refusal = JSONResponse({"error": "this replica has no room: try again later"}, 503, headers)
                await refusal(scope, receive, send)
                return
            with self._counted():
                await app(scope, receive, send)

        config = uvicorn.Config(
            bounded,
            http=BoundedHttp,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            access_log=False,
            log_config=None,
            log_level="critical",
            timeout_graceful_shutdown=math.ceil(ends_within_s),
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


def _listening(host: str, ports: tuple[int, int]) -> socket.socket:
    first, last = ports
    try:
        is_ipv6 = ip_address(host).version == 6
        family, dualstack = (socket.AF_INET6, host == "::") if is_ipv6 else (socket.AF_INET, False)

        def listening_at(port: int) -> socket.socket:
            listening = socket.create_server((host, port), family=family, dualstack_ipv6=dualstack)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else answers wait 40 ms for each other
            return listening

        for port in range(first, last):
            with suppress(OSError):
                return listening_at(port)
        return listening_at(last)
    except (OSError, ValueError) as error:
        at = f" with direct_ports={first}-{last}" if first else ""
        raise UserError(
            f"direct_host={host}{at}: use an IP address of every node that runs replicas, or 0.0.0.0, and a port for each of a "
            f"node's replicas: {error}"
        ) from None
