"""HTTP of a port that strangers may reach: connections, and the heads of requests, are bounded before a token is looked at."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_WITHIN_S = 5.0
MOST_HEAD_BYTES = 64 << 10
MOST_CONNECTIONS = 1_000


class BoundedHttp(HttpToolsProtocol):
    """A connection is cut where a head is too long, or not complete in time, or where there are too many of them.

    uvicorn bounds none of these: its own timer is for connections that have been answered once.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes, self._head_timer = 0, self._timer()
        self._is_in_head = True
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_in_head:
            return
        self._head_bytes += len(data)
        if self._head_timer.cancelled():  # the head of another request on this connection
            self._head_timer = self._timer()
        if self._head_bytes > MOST_HEAD_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True

    def on_headers_complete(self) -> None:
        self._is_in_head, self._head_bytes = False, 0
        self._head_timer.cancel()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    def _timer(self) -> asyncio.TimerHandle:
        return self.loop.call_later(HEAD_WITHIN_S, self.transport.abort)
