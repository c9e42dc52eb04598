"""A model goes over to another under load: every request answered, by the old model or the new, each with its own scores."""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import numpy as np
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from jobs.serve import free_port
from longer.config import Settings
from longer.serving.scorer import Scorer, ScoreRequest, ScoreResult
from tests.serving.tables import DAY_MS, NUM_USERS, START_MS, build_world, checkpoint_path, publish_random_model

ROOT = Path(__file__).parents[2]
CANDIDATES = ["item1", "item5", "never seen"]
END_MS = START_MS + 31 * DAY_MS
NUM_CLIENTS = 3
_WITHIN_S = 60


class Service:
    """A service deployed from a Serve config, as on a cluster."""

    def __init__(self, world: Settings, port: int) -> None:
        self.url, self._arguments = f"http://127.0.0.1:{port}", {"checkpoint": checkpoint_path(world)}
        self._arguments |= {"sequences": world.path("tables", "sequences"), "items": world.path("tables", "items")}

    def roll(self, checkpoint: str | None) -> None:
        deployment = {"name": "scoring", "user_config": {"checkpoint": checkpoint} if checkpoint else None}
        application = {
            "name": "scoring",
            "route_prefix": "/",
            "import_path": "serve_apps.scoring:build_app",
            "args": {**self._arguments, "num_replicas": 2, "max_replicas": 2, "num_cpus": 0.5},
            "runtime_env": {"env_vars": {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}},
            "deployments": [deployment],
        }
        _get_global_client().deploy_apps(
            ServeDeploySchema.model_validate({"applications": [application]}), _blocking=True
        )

    def models(self) -> dict[str, tuple[str, bool]]:
        """Model version of each replica, and whether it has refused another."""
        asked = (httpx.get(f"{self.url}/v1/model", headers={"x-session-id": str(n)}, timeout=30) for n in range(20))
        return {one.headers["x-replica"]: (one.json()["model_version"], one.json()["refused_rollout"]) for one in asked}

    def wait_for(self, *wanted: Any) -> dict[str, tuple[str, bool]]:
        deadline = time.monotonic() + _WITHIN_S
        while set((models := self.models()).values()) != {wanted}:
            assert time.monotonic() < deadline, models
            time.sleep(0.2)
        return models


@pytest.fixture
def service(local_ray: None, tmp_path: Path) -> Iterator[tuple[Service, Settings]]:
    world = build_world(tmp_path)
    port = free_port("127.0.0.1", 8399)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        started = Service(world, port)
        started.roll(None)
        yield started, world
    finally:
        serve.shutdown()


@pytest.mark.ray
def test_models_roll_and_roll_back_without_a_request_lost_and_a_broken_one_is_refused(
    service: tuple[Service, Settings], tmp_path: Path
) -> None:
    started, world = service
    first_path = checkpoint_path(world)
    second_path = publish_random_model(world, seed=1).path
    broken_path = str(tmp_path / "broken")
    shutil.copytree(second_path, broken_path)
    weights = Path(broken_path, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    offline = {s.info.model_version: s for s in (scorer_of(path, world) for path in (first_path, second_path))}
    first, second = offline
    ended = Event()

    def client(number: int) -> list[tuple[int, httpx.Response]]:
        answers = []
        with httpx.Client(timeout=60) as http:
            while not ended.is_set():
                user = len(answers) % NUM_USERS + 1
                body = {"user_id": user, "candidates": CANDIDATES, "request_ts": END_MS}
                headers = {"x-session-id": str(user)}
                answers.append((user, http.post(f"{started.url}/v1/score", json=body, headers=headers)))
        return answers

    replicas = set(started.wait_for(first, False))
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(NUM_CLIENTS)]
        try:
            started.roll(second_path)
            started.wait_for(second, False)
            started.roll(broken_path)
            started.wait_for(second, True)
            started.roll(first_path)
            assert set(started.wait_for(first, False)) == replicas
        finally:
            ended.set()
        answers = [answer for done in clients for answer in done.result()]
    expected = {(v, user): scores_of(scorer, user) for v, scorer in offline.items() for user in range(1, NUM_USERS + 1)}
    seen = set()
    for user, response in answers:
        assert response.status_code == 200, response.text
        answer = response.json()
        seen.add((answer["model_version"], answer["user_state"]["source"]))
        wanted = expected[answer["model_version"], user]
        np.testing.assert_allclose(answer["scores"]["label"], wanted, rtol=0, atol=1e-5)
    assert seen == {(version, source) for version in (first, second) for source in ("load", "hit")}


def scorer_of(checkpoint: str, world: Settings) -> Scorer:
    return Scorer(checkpoint, world.path("tables", "sequences"), 0, world.path("tables", "items"))


def scores_of(scorer: Scorer, user: int) -> np.ndarray:
    [result] = scorer.score([ScoreRequest(user, CANDIDATES, request_ts=END_MS)])
    assert isinstance(result, ScoreResult)
    return result.scores["label"]
