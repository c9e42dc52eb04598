"""The scoring service deployed on a running cluster by `serve deploy` of a config file shaped as serve_apps/scoring.yaml."""

import subprocess
import time
from collections.abc import Iterator

import pytest

from longer.serving.scorer import Scorer, ScoreRequest, ScoreResult
from tests.cluster.nodes import SEEN_DEAD_SOON, free_ports, kill_node, processes_of, running_head
from tests.cluster.service import CANDIDATES, NODES_HAVE_THE_PROJECT, USERS, Service, asking, scores_of
from tests.serving.tables import build_world, checkpoint_path

pytestmark = [pytest.mark.ray, pytest.mark.slow]
_WITHIN_S = 90


def num_replicas(node: subprocess.Popen) -> int:
    return sum("ServeReplica" in command for command in processes_of(node).values())


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A cluster with two nodes for replicas; nothing is deployed yet."""
    world = build_world(tmp_path_factory.mktemp("world"))
    with running_head("--num-cpus=0", environment={**NODES_HAVE_THE_PROJECT, **SEEN_DEAD_SOON}) as head:
        for _ in range(2):
            head.add_node("--num-cpus=2", "--labels", "longer.pool=cpu")
        yield Service(head, world, *free_ports(1))


def test_a_deployed_service_scores_and_a_wrong_path_is_told_with_its_status(service: Service) -> None:
    service.deploy("nowhere")
    assert "nowhere/model.json" in service.wait_for("DEPLOY_FAILED")["message"]
    service.deploy("checkpoints", num_replicas=2, max_replicas=2)
    service.wait_for("RUNNING")
    answer = service.ask(3)
    assert answer.status_code == 200, answer.text
    assert answer.json()["user_state"] == {**answer.json()["user_state"], "source": "load", "num_events": 9}


def test_a_service_that_loses_a_node_goes_on_answering_with_the_same_scores(service: Service) -> None:
    """Some requests may fail while the loss is not yet noticed; asked again, each is answered, and right."""
    service.deploy("checkpoints", num_replicas=2, max_replicas=2)
    service.wait_for("RUNNING")
    lost, left = service.head.nodes
    assert num_replicas(lost) == num_replicas(left) == 1
    before = {user: scores_of(service.ask(user)) for user in USERS}
    check_scores(service, before)
    with asking(service, before, num_clients=2):
        kill_node(lost)
        deadline = time.monotonic() + _WITHIN_S
        while len(service.replicas()) < 2:
            assert time.monotonic() < deadline, "the lost replica did not come up elsewhere"
            time.sleep(0.2)
    assert num_replicas(left) == 2


def check_scores(service: Service, answers: dict[int, list[float]]) -> None:
    """Those of a scorer without a cache."""
    world = service.world
    scorer = Scorer(checkpoint_path(world), world.path("tables", "sequences"), 0, world.path("tables", "items"))
    for user, result in zip(USERS, scorer.score([ScoreRequest(user, CANDIDATES) for user in USERS]), strict=True):
        assert isinstance(result, ScoreResult)
        assert answers[user] == pytest.approx(result.scores["label"], abs=1e-5)
