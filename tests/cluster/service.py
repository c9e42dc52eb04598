"""The scoring application on a cluster, deployed as a user deploys it, and clients that ask it all the time."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from threading import Event

import httpx
import pytest
import yaml

from longer.config import Settings
from tests.cluster.nodes import BIN, ROOT, Head
from tests.serving.tables import NUM_USERS

SERVE = str(BIN / "serve")
CANDIDATES = ["item1", "item5", "never seen"]
USERS = range(1, NUM_USERS + 1)
NODES_HAVE_THE_PROJECT = {"NODES_PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
"""Environment of a cluster whose nodes import what Serve asks for."""

_WITHIN_S = 90
_ANSWERED_WITHIN_S = 15


@dataclass(frozen=True)
class Service:
    """The application's place on a cluster: its config file and its port, on a world of its own."""

    head: Head
    world: Settings
    port: int
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=30), repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/score"

    def deploy(self, checkpoint: str, **args: object) -> None:
        """Sends the shipped config with this checkpoint and these arguments."""
        config = yaml.safe_load((ROOT / "serve_apps/scoring.yaml").read_text())
        config["http_options"]["port"] = self.port
        [application] = config["applications"]
        place = {"cache_bytes": 1 << 20, "pool_label": "longer.pool"}
        application["args"] = {"checkpoint": self.world.path(checkpoint), **place, **args}
        file = self.head.folder / "scoring.yaml"
        file.write_text(yaml.safe_dump(config))
        done = self.head.run(SERVE, "deploy", str(file), "--address", self.head.url)
        assert done.returncode == 0, done.stderr

    def status(self) -> dict:
        done = self.head.run(SERVE, "status", "--address", self.head.url)
        assert done.returncode == 0, done.stderr
        return yaml.safe_load(done.stdout)["applications"]["scoring"]

    def wait_for(self, wanted: str) -> dict:
        """The application's status once it is neither on its way up nor short of replicas; that must be `wanted`."""
        deadline = time.monotonic() + _WITHIN_S
        while (application := self.status())["status"] not in ("RUNNING", "DEPLOY_FAILED"):
            assert time.monotonic() < deadline, application
        assert application["status"] == wanted, application["message"]
        return application

    def ask(self, user: int) -> httpx.Response:
        body = {"user_id": user, "candidates": CANDIDATES}
        return self.client.post(self.url, json=body, headers={"x-session-id": str(user)})

    def replicas(self) -> set[str]:
        """Those that answer."""
        return {self.ask_until_answered(user).headers["x-replica"] for user in range(40)}

    def ask_until_answered(self, user: int) -> httpx.Response:
        """An answer that is no server's failure, asked for again and again, as clients of any service on several nodes do."""
        failures: list[str] = []
        deadline = time.monotonic() + _ANSWERED_WITHIN_S
        while True:
            try:
                answer = self.ask(user)
                if answer.status_code < 500:
                    return answer
                failures.append(f"{answer.status_code} {answer.text}")
            except httpx.TransportError as error:
                failures.append(repr(error))
            assert time.monotonic() < deadline, failures
            time.sleep(0.1)


def scores_of(answer: httpx.Response) -> list[float]:
    assert answer.status_code == 200, answer.text
    return answer.json()["scores"]["label"]


@contextmanager
def asking(service: Service, expected: dict[int, list[float]], num_clients: int) -> Iterator[None]:
    """So many clients ask as long as this lasts; all their answers must have the expected scores."""
    done = Event()

    def ask() -> None:
        for user in cycle(USERS):
            if done.is_set():
                return
            assert scores_of(service.ask_until_answered(user)) == pytest.approx(expected[user], abs=1e-6)

    with ThreadPoolExecutor(num_clients) as pool:
        clients = [pool.submit(ask) for _ in range(num_clients)]
        try:
            yield
        finally:
            done.set()
    for client in clients:
        client.result()
