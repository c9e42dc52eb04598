"""A proxy before an S3 server that fails as networks and servers do: for chosen requests, and it keeps a record of all."""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Request:
    """A request as it came; `number` counts from 0."""

    number: int
    method: str
    path: str
    byte_range: str | None


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a request: another status, half a body and a closed connection, silence before or within the body."""

    status: int | None = None
    cut: bool = False
    delay_s: float = 0.0
    stall_s: float = 0.0


Plan = Callable[[Request], Fault | None]


def no_faults(_: Request) -> None:
    return None


@dataclass
class Proxy:
    """Its address, its plan of faults, which may be exchanged at any time, and what it has seen."""

    url: str
    plan: Plan = no_faults
    requests: list[Request] = field(default_factory=list)
    num_faults: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def seen(self, method: str, path: str, byte_range: str | None) -> Fault | None:
        with self.lock:
            request = Request(len(self.requests), method, path, byte_range)
            self.requests.append(request)
        fault = self.plan(request)
        with self.lock:
            self.num_faults += fault is not None
        return fault


@contextmanager
def proxy_before(upstream_url: str) -> Iterator[Proxy]:
    """A proxy on a free loopback port in front of the server at `upstream_url`."""
    upstream = urlsplit(upstream_url).netloc
    proxy = Proxy("")
    server = _Server(("127.0.0.1", 0), _handler(upstream, proxy))
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield proxy
    server.shutdown()
    server.server_close()
    thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that are killed break their connections: no news here."""


def _handler(upstream: str, proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes, which would wait 40 ms for each other

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.seen(self.command, self.path, self.headers.get("Range")) or Fault()
            time.sleep(fault.delay_s)
            if fault.status:
                self.reply(fault.status, {}, b"<Error><Code>InternalError</Code></Error>", Fault())
                return
            server = http.client.HTTPConnection(upstream, timeout=60)
            try:
                headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
                server.request(self.command, self.path, body, headers)
                answer = server.getresponse()
                self.reply(answer.status, dict(answer.getheaders()), answer.read(), fault)
            finally:
                server.close()

        def reply(self, status: int, headers: dict[str, str], body: bytes, fault: Fault) -> None:
            stated = headers.get("Content-Length", str(len(body))) if self.command == "HEAD" else str(len(body))
            kept = {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}
            try:
                self.send_response_only(status)
                for name, value in {**kept, "Content-Length": stated}.items():
                    self.send_header(name, value)
                self.end_headers()
                half = len(body) // 2 if self.command != "HEAD" else 0
                self.wfile.write(body[:half])
                self.wfile.flush()
                time.sleep(fault.stall_s)
                if fault.cut and half:
                    self.close_connection = True
                elif self.command != "HEAD":
                    self.wfile.write(body[half:])
            except (BrokenPipeError, ConnectionResetError):  # the client gave up on a slow answer, or was killed
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, *_: object) -> None:
            pass

    return Handler
