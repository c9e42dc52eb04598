"""Running services for tests, one after the other behind one Serve, and clients that load them."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import numpy as np
import requests
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from longer.client import ScoringClient
from longer.config import Settings
from longer.errors import UserError
from longer.serving.scorer import Scorer, ScoreRequest, ScoreResult
from serve_apps.scoring import ScoringArgs, build_app
from tests.serving.tables import DAY_MS, NUM_USERS, START_MS, checkpoint_path

ROOT = Path(__file__).parents[2]
CANDIDATES = ["item1", "item5", "never seen"]
END_MS = START_MS + 31 * DAY_MS
HOST = "127.0.0.1"
NUM_CLIENTS = 3
_WITHIN_S = 60
_REFUSED_PAUSE_S = 0.02


@dataclass(frozen=True)
class Front:
    """Where the tests' Serve listens, for HTTP and for gRPC."""

    port: int
    rpc_port: int

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @contextmanager
    def running(self, args: ScoringArgs) -> Iterator[None]:
        """A service while the block runs."""
        try:
            serve.run(build_app(args), name="scoring", route_prefix="/")
            yield
        finally:
            serve.delete("scoring")


Replicas = list[dict[str, Any]]
"""What each tells of itself."""


def wait_for_replicas(
    url: str, is_so: Callable[[Replicas], bool], headers: Mapping[str, str] | None = None
) -> Replicas:
    """What they tell once it is so."""
    deadline = time.monotonic() + _WITHIN_S
    while not is_so(replicas := httpx.get(f"{url}/v1/status", headers=headers, timeout=30).json()["replicas"]):
        assert time.monotonic() < deadline, replicas
        time.sleep(0.2)
    return replicas


def kept(replicas: Replicas) -> Counter[str]:
    """What all of them dumped, restored, warmed and left alone."""
    return sum((Counter(one["kept_states"]) for one in replicas), Counter())


@contextmanager
def running(front: Front, world: Settings, **arguments: Any) -> Iterator[str]:
    """The URL of a service of this world's tables; it ends with the block."""
    args = ScoringArgs(
        checkpoint=world.path("checkpoints"),
        sequences=world.path("tables", "sequences"),
        items=world.path("tables", "items"),
        num_cpus=0.5,
        **arguments,
    )
    with front.running(args):
        yield front.url


class Service:
    """A service deployed from a Serve config, as on a cluster; `deploy` it again to change it."""

    def __init__(self, front: Front, world: Settings, sequences: str, environment: dict[str, str]) -> None:
        self.url = front.url
        self._arguments = {"checkpoint": checkpoint_path(world), "sequences": sequences, "num_cpus": 0.5}
        self._arguments |= {"items": world.path("tables", "items"), "table_silence_s": 0.5, "refresh_s": 1}
        self._arguments["direct_host"] = HOST
        self._environment = {**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}

    def deploy(self, num_replicas: int, checkpoint: str | None = None) -> None:
        """With so many replicas, and the model of another checkpoint or of the first one."""
        bounds = {"min_replicas": num_replicas, "max_replicas": num_replicas}
        delays = {"upscale_delay_s": 0, "downscale_delay_s": 0}
        kwargs = {"warm_s": 600, "gpu_memory_share": 0.95}
        policy = {"policy_function": "longer.autoscaling:ReplicaPolicy", "policy_kwargs": kwargs}
        deployment = {"name": "scoring", "autoscaling_config": {**bounds, **delays, "policy": policy}}
        deployment["user_config"] = {"checkpoint": checkpoint} if checkpoint else None
        application = {
            "name": "scoring",
            "route_prefix": "/",
            "import_path": "serve_apps.scoring:build_app",
            "args": self._arguments,
            "runtime_env": {"env_vars": self._environment},
            "deployments": [deployment],
        }
        _get_global_client().deploy_apps(
            ServeDeploySchema.model_validate({"applications": [application]}), _blocking=True
        )

    def replicas(self) -> dict[str, dict[str, Any]]:
        """Each replica's account, as one of them tells it; none while none answers."""
        try:
            status = httpx.get(f"{self.url}/v1/status", timeout=10)
        except httpx.TransportError:
            return {}
        return {one["replica"]: one for one in status.json()["replicas"]} if status.status_code == 200 else {}

    def wait_for(self, is_so: Callable[[dict[str, dict[str, Any]]], bool]) -> dict[str, dict[str, Any]]:
        deadline = time.monotonic() + _WITHIN_S
        while not is_so(replicas := self.replicas()):
            assert time.monotonic() < deadline, replicas
            time.sleep(0.2)
        return replicas


def num_answered(account: dict[str, Any]) -> int:
    """Score requests that the replica has answered."""
    return sum(account["cache"][source] for source in ("hit", "append", "load", "cold"))


@dataclass
class Answers:
    """What clients were told: answers by user, and how often each refusal came; `lost` had no answer at all.
    `num_direct` of the calls, told once clients have ended, were answered by the replica without Serve's proxy."""

    answered: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    num_direct: int = 0

    def users(self) -> set[int]:
        return {user for user, _ in self.answered}

    def wait_for(self, is_so: Callable[["Answers"], bool]) -> None:
        deadline = time.monotonic() + _WITHIN_S
        while not is_so(self):
            assert time.monotonic() < deadline, (self.users(), self.refused, self.lost)
            time.sleep(0.1)

    def sources(self) -> set[str]:
        return {answer["user_state"]["source"] for _, answer in self.answered}

    def assert_equal(self, expected: dict[tuple[str, int], np.ndarray]) -> None:
        """Every answer has the offline scores of its user by the model that it names."""
        assert self.answered
        for user, answer in self.answered:
            wanted = expected[answer["model_version"], user]
            np.testing.assert_allclose(answer["scores"]["label"], wanted, rtol=0, atol=1e-5)


@contextmanager
def load(
    url: str,
    users: Sequence[int] = range(1, NUM_USERS + 1),
    timeout_s: float = 20,
    max_retries: int = 2,
    together: bool = False,
) -> Iterator[Answers]:
    """Clients that ask for these users over and over while the block runs, one after the other or all `together`; the answers are
    whole when it has ended."""
    ended, answers = Event(), Answers()

    def ask_on(number: int) -> None:
        straight = number > 0  # where the replicas have addresses of their own
        client, asked = ScoringClient(url, None, timeout_s, max_retries, straight), number
        while not ended.is_set():
            some = users if together else [users[asked % len(users)]]
            asked += 1
            began_s = time.perf_counter()
            try:
                if together:
                    bodies = [{"user_id": user, "candidates": CANDIDATES, "request_ts": END_MS} for user in some]
                    told = client.score_batch(bodies)
                else:
                    told = [client.score(user, CANDIDATES, request_ts=END_MS) for user in some]
                answers.latencies_ms.append((time.perf_counter() - began_s) * 1000)
                for user, answer in zip(some, told, strict=True):
                    if "error" in answer:
                        answers.refused[f"{answer['error']} ({answer['status']})"] += 1
                    else:
                        answers.answered.append((user, answer))
            except UserError as refusal:
                answers.refused[str(refusal)] += 1
                time.sleep(_REFUSED_PAUSE_S)
            except requests.RequestException as error:
                answers.lost[repr(error)] += 1

        answers.num_direct += client.num_direct

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        clients = [pool.submit(ask_on, number) for number in range(NUM_CLIENTS)]
        try:
            yield answers
        finally:
            ended.set()
        for client in clients:
            client.result()


def offline_scores(world: Settings, *checkpoints: str) -> dict[tuple[str, int], np.ndarray]:
    """Scores of the candidates by model version and user, each history encoded from scratch."""
    scores = {}
    for checkpoint in checkpoints:
        scorer = Scorer(checkpoint, world.path("tables", "sequences"), 0, world.path("tables", "items"))
        for user in range(1, NUM_USERS + 1):
            [result] = scorer.score([ScoreRequest(user, CANDIDATES, request_ts=END_MS)])
            assert isinstance(result, ScoreResult)
            scores[scorer.info.model_version, user] = result.scores["label"]
    return scores
