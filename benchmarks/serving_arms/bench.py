"""One arm after the other on the machine's Ray: deployed, loaded in a closed and an open loop, and told in a line of the table."""

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
_WITHIN_S = 120.0


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


def _times(sample: Sample) -> str:
    return f"{sample.percentile_ms(50):.1f} / {sample.percentile_ms(99):.1f}"


class Bench:
    """The machine's Ray with one HTTP proxy, the load, and all that is measured with them."""

    def __init__(self, asked: argparse.Namespace, world: World) -> None:
        self.asked, self.world, self.load = asked, world, Load(asked.load_processes)
        self._port = free_port("127.0.0.1", 8431)
        self.url = f"http://127.0.0.1:{self._port}"
        serve.start(http_options={"host": "127.0.0.1", "port": self._port})

    def measure(self, name: str, url: str, bodies: Sequence[Body], with_open: bool = True) -> Arm:
        """An arm whose bodies may be sent again and again; without the open loop if not `with_open`."""
        seconds, samples = self.asked.seconds, {}
        self.load.closed(url, bodies, max(self.asked.clients), seconds / 2)
        for num_clients in self.asked.clients:
            samples[num_clients] = self.load.closed(url, bodies, num_clients, seconds)
        best = best_of(samples)
        at_load = self.load.open(url, bodies, LOAD_SHARE * samples[best].rps, seconds) if with_open else None
        return self._said(Arm(name, samples[self.asked.clients[0]], samples[best], best, at_load))

    def measure_trace(self, name: str, bodies: Sequence[Body]) -> Arm:
        """An arm whose bodies are sent once, in their order: a part of them for each number of clients."""
        levels = self.asked.clients
        parts = [
            bodies[len(bodies) * i // len(levels) : len(bodies) * (i + 1) // len(levels)] for i in range(len(levels))
        ]
        samples = {
            num: self.load.closed(self.url, part, num, self.asked.seconds, again=False)
            for num, part in zip(levels, parts, strict=True)
        }
        best = best_of(samples)
        return self._said(Arm(name, samples[levels[0]], samples[best], best, None))

    @staticmethod
    def _said(arm: Arm) -> Arm:
        print(arm.row(), file=sys.stderr, flush=True)
        return arm

    # -- services -----------------------------------------------------------------------------------------------------

    def deploy(self, num_replicas: int, **arguments: Any) -> None:
        """This service; once more with another number of replicas, and those that run stay as they are."""
        asked = self.asked
        tables = {name: self.world.settings.path("tables", name) for name in ("sequences", "items")}
        gpus = {"num_gpus": asked.gpus_per_replica} if asked.device == "cuda" else {}
        sizes = {
            "max_body_bytes": 8 << 20,
            "max_batch_requests": asked.max_batch_requests,
            "batch_wait_ms": asked.batch_wait_ms,
        }
        args = {"checkpoint": self.world.checkpoint, **tables, **gpus, **sizes, "cache_bytes": asked.cache_bytes}
        args |= {"num_cpus": 0.5, "torch_threads": asked.torch_threads, "timeout_s": 60, "refresh_s": 2, **arguments}
        bounds = {"min_replicas": num_replicas, "max_replicas": num_replicas}
        application = {
            "name": "scoring",
            "route_prefix": "/",
            "import_path": "serve_apps.scoring:build_app",
            "args": args,
            "deployments": [
                {"name": "scoring", "autoscaling_config": {**bounds, "upscale_delay_s": 0, "downscale_delay_s": 0}}
            ],
        }
        _get_global_client().deploy_apps(
            ServeDeploySchema.model_validate({"applications": [application]}), _blocking=True
        )
        deadline = time.monotonic() + _WITHIN_S
        while (num := self._num_replicas()) != num_replicas:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{num} replicas instead of {num_replicas} after {_WITHIN_S:.0f} s")
            time.sleep(0.2)

    def _num_replicas(self) -> int:
        status = requests.get(f"{self.url}/v1/status", timeout=30)
        return len(status.json()["replicas"]) if status.status_code == 200 else 0

    def state_bytes(self) -> float:
        """Mean bytes of a user's state."""
        cache = requests.get(f"{self.url}/v1/status", timeout=30).json()["cache"]
        return cache["bytes"] / max(cache["states"], 1)

    def answer(self) -> bytes:
        session, body = self.world.hits[0]
        return requests.post(f"{self.url}/v1/score", data=body, headers={"x-session-id": session}, timeout=60).content

    def floor(self, answer: bytes, num_replicas: int, with_open: bool = True) -> Arm:
        app = floor_app(answer, num_replicas, 4 * self.asked.max_batch_requests)
        serve.run(app, name="floor", route_prefix="/")
        arm = self.measure(f"floor, {num_replicas} replica(s)", self.url, self.world.hits, with_open)
        serve.delete("floor")
        return arm

    def alone(self, name: str, kind: str, args: ServerArgs) -> Arm:
        """A server of one process."""
        with _process(args.command(kind), args.port) as url:
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
