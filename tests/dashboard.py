"""A server with the few addresses of Ray's job interface that `longer.submit` uses, which answers as a test tells it."""

import asyncio
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

JOB = "raysubmit_1"


@dataclass
class Dashboard:
    """What it knows of the one job, and what it was sent."""

    url: str = ""
    status: str = "RUNNING"
    message: str = ""
    exit_code: int | None = None
    log: str = ""
    num_tails: int = 0
    at_tail: Callable[["Dashboard"], None] = lambda _: None
    """Called when a client has been sent the log, and before its connection is cut."""
    failures: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Per kind of request, the answers that come first instead."""
    uploaded: list[set[str]] = field(default_factory=list)
    runtime_env: dict = field(default_factory=dict)

    def failure(self, kind: str) -> web.Response | None:
        if not self.failures.get(kind):
            return None
        code, text = self.failures[kind].pop(0)
        return web.Response(status=code, text=text)

    async def version(self, _: web.Request) -> web.Response:
        return self.failure("version") or web.json_response({"version": "4", "ray_version": "2.60.0"})

    async def package(self, request: web.Request) -> web.Response:
        if request.method == "GET":
            return web.Response(status=404)
        if failed := self.failure("upload"):
            return failed
        with zipfile.ZipFile(io.BytesIO(await request.read())) as package:
            self.uploaded.append(set(package.namelist()))
        return web.Response()

    async def submit(self, request: web.Request) -> web.Response:
        self.runtime_env = (await request.json())["runtime_env"]
        return self.failure("submit") or web.json_response({"job_id": JOB, "submission_id": JOB})

    async def job(self, _: web.Request) -> web.Response:
        about = {"type": "SUBMISSION", "submission_id": JOB, "entrypoint": "python", "status": self.status}
        about |= {"message": self.message, "driver_exit_code": self.exit_code}
        return self.failure("job") or web.json_response(about)

    async def logs(self, _: web.Request) -> web.Response:
        return self.failure("logs") or web.json_response({"logs": self.log})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        self.num_tails += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for line in self.log.splitlines(keepends=True):
            await socket.send_str(line)
        self.at_tail(self)
        await socket.close()
        return socket


@contextmanager
def serving(dashboard: Dashboard) -> Iterator[Dashboard]:
    """The dashboard, on a free loopback port."""
    app = web.Application(client_max_size=100 << 20)
    app.router.add_get("/api/version", dashboard.version)
    app.router.add_route("*", "/api/packages/{protocol}/{name}", dashboard.package)
    app.router.add_post("/api/jobs/", dashboard.submit)
    app.router.add_get(f"/api/jobs/{JOB}", dashboard.job)
    app.router.add_get(f"/api/jobs/{JOB}/logs", dashboard.logs)
    app.router.add_get(f"/api/jobs/{JOB}/logs/tail", dashboard.tail)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    dashboard.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield dashboard
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(runner.cleanup())
        loop.close()
