"""One arm after the other on the machine's Ray: deployed, loaded in a closed and an open loop, and told in a line of the table."""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import requests
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from benchmarks.serving_arms.arms import Arm
from benchmarks.serving_arms.load import Body, Load, Place, Sample
from benchmarks.serving_arms.servers import ServerArgs, floor_app
from benchmarks.serving_arms.world import World
from jobs.serve import free_port

LOAD_SHARE = 0.7
FLOOR = "floor"
_WITHIN_S = 240.0


@dataclass(frozen=True)
class Service:
    """This service with so many replicas; `arguments` differ from the benchmark's own."""

    num_replicas: int
    arguments: dict[str, Any] = field(default_factory=dict)


class Bench:
    """The machine's Ray with one HTTP proxy, the load, and all that is measured with them."""

    def __init__(self, asked: argparse.Namespace, world: World) -> None:
        self.asked, self.world, self.load = asked, world, Load(asked.load_processes)
        self._port, self._wanted = free_port("127.0.0.1", 8431), dict[str, int]()
        serve.start(http_options={"host": "127.0.0.1", "port": self._port})

    def url(self, app: str) -> str:
        return f"http://127.0.0.1:{self._port}/{app}"

    def place(self, app: str) -> Place:
        """A service and its replicas, told as it tells clients, once it tells of all: they hear of a new one one by one."""
        deadline = time.monotonic() + _WITHIN_S
        while True:
            answer = requests.get(f"{self.url(app)}/v1/replicas", timeout=30)
            answer.raise_for_status()
            if len(urls := answer.json()["urls"]) == self._wanted[app] or time.monotonic() > deadline:
                return Place(self.url(app), urls)
            time.sleep(0.2)

    def measure(self, name: str, place: Place, bodies: Sequence[Body], with_open: bool = True) -> Arm:
        """An arm whose bodies may be sent again and again; without the open loop if not `with_open`."""
        *_, [arm] = self.measured_together({name: place}, bodies, 1, with_open)
        return arm

    def measured_together(
        self, places: Mapping[str, Place], bodies: Sequence[Body], num_rounds: int, with_open: bool = True
    ) -> Iterator[list[Arm]]:
        """Arms by name, as they are after each round and last with their open loops; window by window in turn, so that all of
        them meet the same load of the machine."""
        seconds, levels = self.asked.seconds, self.asked.clients
        for place in places.values():
            self.load.closed(place, bodies, max(levels), seconds / 2)
        arms = [Arm(name, []) for name in places]
        for _ in range(num_rounds):
            samples: dict[str, dict[int, Sample]] = {name: {} for name in places}
            for num_clients in levels:
                for name, place in places.items():
                    samples[name][num_clients] = sample = self.load.closed(place, bodies, num_clients, seconds)
                    if not sample.latencies_ms:
                        raise RuntimeError(f"{name}: no request was answered: {dict(sample.failed)}")
            arms = [replace(arm, rounds=[*arm.rounds, samples[arm.name]]) for arm in arms]
            yield arms
        if with_open:
            loads = [self.load.open(places[arm.name], bodies, LOAD_SHARE * arm.rps, 2 * seconds) for arm in arms]
            arms = [replace(arm, at_load=load) for arm, load in zip(arms, loads, strict=True)]
        yield [self._said(arm) for arm in arms]

    def measure_trace(self, name: str, place: Place, bodies: Sequence[Body]) -> Arm:
        """An arm whose bodies are sent once, in their order: a part of them for each number of clients."""
        levels = self.asked.clients
        parts = [
            bodies[len(bodies) * i // len(levels) : len(bodies) * (i + 1) // len(levels)] for i in range(len(levels))
        ]
        samples = {
            num: self.load.closed(place, part, num, self.asked.seconds, again=False)
            for num, part in zip(levels, parts, strict=True)
        }
        return self._said(Arm(name, [samples]))

    @staticmethod
    def _said(arm: Arm) -> Arm:
        print(arm.row(), file=sys.stderr, flush=True)
        return arm

    # -- services -----------------------------------------------------------------------------------------------------

    def deploy(self, **services: Service) -> None:
        """These services by name, no others of the kind, and the floor if it runs; one with another number of replicas keeps those
        that run."""
        applications = [self._application(name, service) for name, service in services.items()]
        _get_global_client().deploy_apps(
            ServeDeploySchema.model_validate({"applications": applications}), _blocking=False
        )
        self._wanted = wanted = {name: service.num_replicas for name, service in services.items()}
        deadline = time.monotonic() + _WITHIN_S  # Serve's own wait is too short for kernels to be compiled
        while (found := self._running()) != wanted:
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
        args |= {
            "direct_host": "127.0.0.1",
            "num_cpus": 0.5,
            "torch_threads": asked.torch_threads,
            "timeout_s": 60,
            **service.arguments,
        }
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

    def _running(self) -> dict[str, int]:
        return {name: self._num_replicas(name) for name in serve.status().applications if name != FLOOR}

    def _num_replicas(self, app: str) -> int:
        try:
            status = requests.get(f"{self.url(app)}/v1/status", timeout=30)
        except requests.RequestException:  # it is being started
            return 0
        return len(status.json()["replicas"]) if status.status_code == 200 else 0

    def warm_up(self, *apps: str) -> None:
        """Each user's state is there afterwards."""
        for app in apps:
            if failed := self.load.once(self.place(app), self.world.hits).failed:
                raise RuntimeError(f"{app}: warming up failed: {dict(failed)}")

    def state_bytes(self, app: str) -> float:
        """Mean bytes of a user's state."""
        cache = requests.get(f"{self.url(app)}/v1/status", timeout=30).json()["cache"]
        return cache["bytes"] / max(cache["states"], 1)

    def answer(self, app: str) -> bytes:
        session, body = self.world.hits[0]
        headers = {"x-session-id": session}
        return requests.post(f"{self.url(app)}/v1/score", data=body, headers=headers, timeout=60).content

    def floor(self, answer: bytes, num_replicas: int, with_open: bool = True) -> Arm:
        """The floor alone."""
        with self.floor_running(answer, num_replicas) as place:
            return self.measure(f"floor, {num_replicas} replica(s)", place, self.world.hits, with_open)

    @contextmanager
    def floor_running(self, answer: bytes, num_replicas: int) -> Iterator[Place]:
        """A floor of so many replicas, while the block runs."""
        handle = serve.run(
            floor_app(answer, num_replicas, 4 * self.asked.max_batch_requests), name=FLOOR, route_prefix=f"/{FLOOR}"
        )
        urls = handle.broadcast("own_url").results(timeout_s=_WITHIN_S)
        yield Place(self.url(FLOOR), dict(urls))
        serve.delete(FLOOR)

    def alone(self, name: str, kind: str, args: ServerArgs) -> Arm:
        """A server of one process, alone."""
        with starting(kind, args) as server:
            return self.measure(name, Place(self.url_of(server)), self.world.hits, with_open=kind != "echo")

    def url_of(self, server: "Server") -> str:
        """Once it has answered; on a GPU its first answers wait for kernels to be compiled."""
        deadline, left = time.monotonic() + _WITHIN_S, self.world.hits[:4]
        while left:
            headers = {"content-type": "application/json"}
            try:
                answer = requests.post(f"{server.url}/v1/score", data=left[-1][1], headers=headers, timeout=_WITHIN_S)
                answer.raise_for_status()
                left.pop()
            except requests.ConnectionError:
                if server.process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        return server.url


@dataclass(frozen=True)
class Server:
    """One process, and where it answers once it is up."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def starting(kind: str, args: ServerArgs) -> Iterator[Server]:
    """A server that runs while the block does."""
    process = subprocess.Popen(args.command(kind))
    try:
        yield Server(f"http://127.0.0.1:{args.port}", process)
    finally:
        process.terminate()
        process.wait()
