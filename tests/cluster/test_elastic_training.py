"""Elastic training on a cluster: a node that goes for good takes a worker along, and the rest of the run is the other's."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longer.storage import Table
from tests.cluster.nodes import ROOT, SEEN_DEAD_SOON, kill_node, running_head
from tests.data.test_build_on_ray import run_all, settings_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
_COMMITTED_SOON = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
_WITHIN_S = 150


def test_training_goes_on_with_the_workers_that_are_left_and_trains_each_request_once(tmp_path: Path) -> None:
    """Takes about a minute: two nodes, and three starts of workers."""
    settings = settings_of(tmp_path, requests={"validation_days_share": 0.1})
    requests = run_all(settings)[-1]
    train = {"tokens_per_step": 320, "epochs": 40, "validate_every_steps": 8, "num_workers": [1, 2]}
    config, log = tmp_path / "settings.yaml", tmp_path / "said"
    config.write_text(json.dumps({**json.loads(settings.model_dump_json(exclude={"ray", "train"})), "train": train}))
    with running_head("--num-cpus=0", environment={**SEEN_DEAD_SOON, **_COMMITTED_SOON}) as head:
        for _ in range(2):
            head.add_node("--num-cpus=1")
        command = [sys.executable, "-m", "jobs.train", "--config", str(config), "--ray.address", head.address]
        with log.open("w") as said:
            job = subprocess.Popen(command, cwd=ROOT, env=head.environment, stderr=said)
        deadline = time.monotonic() + _WITHIN_S
        while log.read_text().count("with checkpoint") < 2:
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        kill_node(head.nodes[-1])
        assert job.wait(_WITHIN_S) == 0, log.read_text()
    starts = re.findall(r"starting at step (\d+) with (\d) workers", log.read_text())
    assert [workers for _, workers in starts] == ["2", "1"]
    assert int(starts[1][0]) > 0
    version = Table(settings.path("checkpoints")).current()
    assert version is not None
    (trained,) = version.manifest["trained"]
    tallies = {json.dumps(epoch) for epoch in trained["epochs"]}
    assert len(trained["epochs"]) == 40
    assert len(tallies) == 1
    assert trained["epochs"][0]["num_requests"] == requests.manifest["num_requests"]["train"]
