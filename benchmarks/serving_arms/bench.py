"""One arm after the other on the machine's Ray: deployed, loaded in a closed and an open loop, and told in a line of the table."""

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import requests
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from benchmarks.serving_arms.load import Body, Load, Sample
from benchmarks.serving_arms.servers import ServerArgs, floor_app
from benchmarks.serving_arms.world import World
from jobs.serve import free_port

MOST_P99_MS = 50.0
LOAD_SHARE = 0.7
_WITHIN_S = 240.0


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    name: str
    one_client: Sample
    best: Sample
    num_clients: int
    at_load: Sample | None

    @property
    def rps(self) -> float:
        return self.best.rps

    @property
    def is_within(self) -> bool:
        return self.best.percentile_ms(99) <= MOST_P99_MS

    def row(self) -> str:
        mark = "" if self.is_within else f" (p99 {self.best.percentile_ms(99):.0f} ms)"
        at_load = "-" if self.at_load is None else _times(self.at_load)
        failed = sum((one.failed for one in (self.one_client, self.best, self.at_load) if one), Counter[str]())
        states = " ".join(f"{count} {source}" for source, count in sorted(self.best.sources.items())) or "-"
        return (
            f"| {self.name} | {_times(self.one_client)} | {self.rps:.0f}{mark} | {self.num_clients} | {at_load} | {states} | "
            f"{dict(failed) or 'none'} |"
        )


@dataclass(frozen=True)
class Service:
    """This service with so many replicas; `arguments` differ from the benchmark's own."""

    num_replicas: int
    arguments: dict[str, Any] = field(default_factory=dict)


def _times(sample: Sample) -> str:
    return f"{sample.percentile_ms(50):.1f} / {sample.percentile_ms(99):.1f}"


class Bench:
    """The machine's Ray with one HTTP proxy, the load, and all that is measured with them."""

    def __init__(self, asked: argparse.Namespace, world: World) -> None:
        self.asked, self.world, self.load = asked, world, Load(asked.load_processes)
        self._port = free_port("127.0.0.1", 8431)
        serve.start(http_options={"host": "127.0.0.1", "port": self._port})

    def url(self, app: str) -> str:
        return f"http://127.0.0.1:{self._port}/{app}"

    def measure(self, name: str, url: str, bodies: Sequence[Body], with_open: bool = True) -> Arm:
        """An arm whose bodies may be sent again and again; without the open loop if not `with_open`."""
        seconds, samples = self.asked.seconds, {}
        self.load.closed(url, bodies, max(self.asked.clients), seconds / 2)
        for num_clients in self.asked.clients:
            samples[num_clients] = self.load.closed(url, bodies, num_clients, seconds)
        best = best_of(samples)
        if not samples[best].latencies_ms:
            raise RuntimeError(f"{name}: no request was answered: {dict(samples[best].failed)}")
        at_load = self.load.open(url, bodies, LOAD_SHARE * samples[best].rps, seconds) if with_open else None
        return self._said(Arm(name, samples[self.asked.clients[0]], samples[best], best, at_load))

    def measure_trace(self, name: str, url: str, bodies: Sequence[Body]) -> Arm:
        """An arm whose bodies are sent once, in their order: a part of them for each number of clients."""
        levels = self.asked.clients
        parts = [
            bodies[len(bodies) * i // len(levels) : len(bodies) * (i + 1) // len(levels)] for i in range(len(levels))
        ]
        samples = {
            num: self.load.closed(url, part, num, self.asked.seconds, again=False)
            for num, part in zip(levels, parts, strict=True)
        }
        best = best_of(samples)
        return self._said(Arm(name, samples[levels[0]], samples[best], best, None))

    @staticmethod
    def _said(arm: Arm) -> Arm:
        print(arm.row(), file=sys.stderr, flush=True)
        return arm

    # -- services -----------------------------------------------------------------------------------------------------

    def deploy(self, **services: Service) -> None:
        """These services by name, and no others; one with another number of replicas keeps those that run."""
        applications = [self._application(name, service) for name, service in services.items()]
        _get_global_client().deploy_apps(
            ServeDeploySchema.model_validate({"applications": applications}), _blocking=False
        )
        wanted = {name: service.num_replicas for name, service in services.items()}
        deadline = time.monotonic() + _WITHIN_S  # Serve's own wait is too short for kernels to be compiled
        while (found := {name: self._num_replicas(name) for name in serve.status().applications}) != wanted:
            failed = [app.message for app in serve.status().applications.values() if app.status == "DEPLOY_FAILED"]
            if failed or time.monotonic() > deadline:
                raise RuntimeError(f"replicas: {found} instead of {wanted}: {failed}")
            time.sleep(0.2)

    def _application(self, name: str, service: Service) -> dict[str, Any]:
        asked = self.asked
        tables = {table: self.world.settings.path("tables", table) for table in ("sequences", "items")}
        gpus = {"num_gpus": asked.gpus_per_replica} if asked.device == "cuda" else {}
        sizes = {
            "max_body_bytes": 8 << 20,
            "max_batch_requests": asked.max_batch_requests,
            "usual_candidates": asked.candidates,
        }
        args = {"checkpoint": self.world.checkpoint, **tables, **gpus, **sizes, "cache_bytes": asked.cache_bytes}
        args |= {"num_cpus": 0.5, "torch_threads": asked.torch_threads, "timeout_s": 60, **service.arguments}
        bounds = {"min_replicas": service.num_replicas, "max_replicas": service.num_replicas}
        return {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": "serve_apps.scoring:build_app",
            "args": args,
            "deployments": [
                {"name": "scoring", "autoscaling_config": {**bounds, "upscale_delay_s": 0, "downscale_delay_s": 0}}
            ],
        }

    def _num_replicas(self, app: str) -> int:
        try:
            status = requests.get(f"{self.url(app)}/v1/status", timeout=30)
        except requests.RequestException:  # it is being started
            return 0
        return len(status.json()["replicas"]) if status.status_code == 200 else 0

    def state_bytes(self, app: str) -> float:
        """Mean bytes of a user's state."""
        cache = requests.get(f"{self.url(app)}/v1/status", timeout=30).json()["cache"]
        return cache["bytes"] / max(cache["states"], 1)

    def answer(self, app: str) -> bytes:
        session, body = self.world.hits[0]
        headers = {"x-session-id": session}
        return requests.post(f"{self.url(app)}/v1/score", data=body, headers=headers, timeout=60).content

    def floor(self, answer: bytes, num_replicas: int, with_open: bool = True) -> Arm:
        app = floor_app(answer, num_replicas, 4 * self.asked.max_batch_requests)
        serve.run(app, name="floor", route_prefix="/floor")
        arm = self.measure(f"floor, {num_replicas} replica(s)", self.url("floor"), self.world.hits, with_open)
        serve.delete("floor")
        return arm

    def alone(self, name: str, kind: str, args: ServerArgs) -> Arm:
        """A server of one process."""
        with _process(args.command(kind), args.port) as url:
            for _, body in self.world.hits[:4]:  # on a GPU the first ones wait for kernels to be compiled
                headers = {"content-type": "application/json"}
                requests.post(f"{url}/v1/score", data=body, headers=headers, timeout=_WITHIN_S).raise_for_status()
            return self.measure(name, url, self.world.hits, with_open=kind != "echo")


def best_of(samples: dict[int, Sample]) -> int:
    """The number of clients with most requests a second at p99 within bounds; at any p99 if it never is."""
    within = [num for num, sample in samples.items() if sample.percentile_ms(99) <= MOST_P99_MS]
    return max(within or samples, key=lambda num: samples[num].rps)


@contextmanager
def _process(command: list[str], port: int) -> Iterator[str]:
    process = subprocess.Popen(command)
    try:
        for tries in count():
            try:
                requests.post(f"http://127.0.0.1:{port}/v1/score", data=b"{}", timeout=30)
                break
            except requests.ConnectionError:
                if process.poll() is not None or tries > 600:
                    raise
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
