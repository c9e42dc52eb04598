"""HTTP of a port that strangers may reach: connections, and what each may send, are bounded before a token is looked at."""

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

REQUEST_WITHIN_S = 5
"""How long a request may take to come, and an answer to be read as far as it waits here."""
KEEP_ALIVE_S = 75
"""How long a connection may idle once a call has been accepted on it; before, no longer than a request may take."""
MOST_HEAD_BYTES = 64 << 10
MOST_CONNECTIONS = 1_000
CALL, IS_ACCEPTED = "call", "is_accepted"
"""What the application says in a scope's `state`: the task that answers and, before it does, that its caller is no stranger."""


class BoundedHttp(HttpToolsProtocol):
    """A connection is cut where a request is not complete in time, though it has been answered; where an answer is not read; where
    a head, or anything else that is no body, is too long; where another request comes before the last one's answer; or where there
    are too many connections. Strangers who have been answered may keep theirs for no longer than those who have not.
    A call whose connection is lost before its answer is cancelled, as Serve's proxy does it.

    uvicorn does none of this: its own timer is for connections that have been answered once and keep silent, whosever they are.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive = REQUEST_WITHIN_S
        self._num_bytes, self._is_in_request = 0, True
        self._request, self._reading = (_Deadline(self.loop, transport.abort) for _ in range(2))
        self._request.set()
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        super().data_received(data)
        if self._num_bytes > MOST_HEAD_BYTES:
            self.transport.abort()
        if self._is_in_request or self.transport.is_closing():  # after a mistake, once all is read
            self._request.set()

    def on_message_begin(self) -> None:
        self._is_in_request = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self.cycle and not self.cycle.response_complete:
            raise ValueError("a request before the last one's answer")  # which ends the connection
        self._num_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_bytes = 0  # what comes between the last of it and the end is kept as headers are
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_bytes, self._is_in_request = 0, False
        self._request.lift()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.cycle.scope["state"].get(IS_ACCEPTED):
            self.timeout_keep_alive = KEEP_ALIVE_S
        if self.transport.is_closing():  # once all is read
            self._reading.set()
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()

    def pause_writing(self) -> None:
        self._reading.set()
        super().pause_writing()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._reading.lift()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request.lift()
        self._reading.lift()
        self._unset_keepalive_if_required()  # uvicorn leaves it where the other side has reset the connection
        super().connection_lost(exc)
        if self.cycle and self.cycle.disconnected and (call := self.cycle.scope["state"].get(CALL)):
            call.cancel()


class _Deadline:
    """Cuts a connection once it has been set for so long; setting it again changes nothing."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cut: Callable[[], None]) -> None:
        self._loop, self._cut = loop, cut
        self._timer: asyncio.TimerHandle | None = None

    def set(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(REQUEST_WITHIN_S, self._cut)

    def lift(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
