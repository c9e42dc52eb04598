"""The scoring service deployed on a running cluster by `serve deploy` of a config file shaped as serve_apps/scoring.yaml."""

import time
from pathlib import Path

import httpx
import pytest
import yaml

from tests.cluster.nodes import BIN, ROOT, Head, free_ports, running_head
from tests.serving.tables import build_world

SERVE = str(BIN / "serve")
_WITHIN_S = 90


def status(head: Head) -> dict:
    done = head.run(SERVE, "status", "--address", head.url)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["applications"]["scoring"]


def wait_for(head: Head, wanted: str) -> dict:
    deadline = time.monotonic() + _WITHIN_S
    while (application := status(head))["status"] != wanted:
        assert time.monotonic() < deadline, application
    return application


@pytest.mark.ray
def test_a_deployed_service_scores_and_a_wrong_path_is_told_with_its_status(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    config = yaml.safe_load((ROOT / "serve_apps/scoring.yaml").read_text())
    [config["http_options"]["port"]] = free_ports(1)
    [application] = config["applications"]
    file = tmp_path / "scoring.yaml"

    def deploy(checkpoint: str) -> None:
        application["args"] = {"checkpoint": checkpoint, "cache_bytes": 1 << 20, "pool_label": "longer.pool"}
        file.write_text(yaml.safe_dump(config))
        done = head.run(SERVE, "deploy", str(file), "--address", head.url)
        assert done.returncode == 0, done.stderr

    path = f"{ROOT}:{ROOT / 'platform'}"  # as on a cluster whose nodes have the project
    with running_head("--num-cpus=0", environment={"NODES_PYTHONPATH": path}) as head:
        head.add_node("--num-cpus=2", "--labels", "longer.pool=cpu")
        deploy(world.path("nowhere"))
        assert "nowhere/model.json" in wait_for(head, "DEPLOY_FAILED")["message"]
        deploy(world.path("checkpoints"))
        wait_for(head, "RUNNING")
        url = f"http://127.0.0.1:{config['http_options']['port']}/v1/score"
        answer = httpx.post(
            url, json={"user_id": 3, "candidates": ["item1"]}, headers={"x-session-id": "3"}, timeout=30
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["user_state"] == {**answer.json()["user_state"], "source": "load", "num_events": 9}
