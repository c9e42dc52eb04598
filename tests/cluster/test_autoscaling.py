"""Autoscaling as `ray up` and KubeRay do it (autoscaler v2), on a provider whose nodes are processes of this machine."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longer.config import load_settings
from tests.cluster.nodes import Head, free_ports, running_head
from tests.cluster.service import NODES_HAVE_THE_PROJECT, USERS, Service, asking, scores_of
from tests.data.import_logs import settings_of, write_day
from tests.data.test_build_survives import settings_with_events
from tests.serving.tables import build_world

pytestmark = [pytest.mark.ray, pytest.mark.slow]
POOL = "longer.pool"
HEAD_ID = "f" * 51 + "0" * 5  # what the provider calls the head
_WITHIN_S = 90


def autoscaling_config(port: int) -> dict:
    """As cluster.yaml: a head without CPUs, and from zero up nodes for work with and without GPUs."""
    empty = {"node_config": {}, "min_workers": 0, "max_workers": 2}
    commands = ["setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands"]
    commands += ["head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"]
    return {
        "cluster_name": "test",
        "max_workers": 3,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 10.0,
        "provider": {
            "type": "external",  # by its own name it wants defaults that the package lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": {**empty, "resources": {"CPU": 1, "object_store_memory": 10**8}, "labels": {POOL: "cpu"}},
            "gpu": {**empty, "resources": {"CPU": 8, "GPU": 1, "object_store_memory": 10**8}, "labels": {POOL: "gpu"}},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        **{name: [] for name in commands},
    }


_NODES = """
import json, ray
ray.init("auto", log_to_driver=False)
print("pools", json.dumps([node["Labels"].get("longer.pool") for node in ray.nodes() if node["Alive"]]))
"""


def pools(head: Head) -> list[str]:
    """The pool label of each living node but the head, which has none."""
    done = head.run(sys.executable, "-c", _NODES, RAY_ADDRESS=head.address)
    assert done.returncode == 0, done.stderr
    [line] = [
        line for line in done.stdout.splitlines() if line.startswith("pools ")
    ]  # Ray's own may come before and after
    return sorted(pool for pool in json.loads(line.removeprefix("pools ")) if pool)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(1)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    [port] = free_ports(1)
    autoscaling = tmp_path_factory.mktemp("autoscaling") / "config.json"
    autoscaling.write_text(json.dumps(autoscaling_config(port)))
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        **NODES_HAVE_THE_PROJECT,
    }
    flags = ["--num-cpus=0", f"--autoscaling-config={autoscaling}"]
    with running_head(*flags, port=port, environment=environment) as started:
        yield started


def test_a_queued_job_brings_up_the_nodes_it_asks_for_and_idleness_takes_them_down(head: Head, tmp_path: Path) -> None:
    chosen = settings_with_events(tmp_path / "run")
    config = tmp_path / "settings.yaml"
    config.write_text(chosen.model_dump_json(exclude={"ray"}))
    load_settings(str(config))
    assert pools(head) == []
    words = ["--config", str(config), "--ray.address", head.address, "--ray.pool_label", POOL]
    done = head.run(sys.executable, "-m", "jobs.build_sequences", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    up = pools(head)
    assert up, "who built it?"
    assert set(up) == {"cpu"}, "a GPU node was started for work without GPUs"
    wait_until(lambda: pools(head) == [], "idle nodes stay")


def test_an_import_of_many_small_files_brings_up_the_nodes_it_asks_for(head: Head, tmp_path: Path) -> None:
    for number in range(40):
        write_day(tmp_path / "log", number)
    config = tmp_path / "settings.yaml"
    config.write_text(settings_of(tmp_path / "run", tmp_path / "log").model_dump_json(exclude={"ray"}))
    wait_until(lambda: pools(head) == [], "nodes of the test before stay")
    words = ["--config", str(config), "--ray.address", head.address, "--ray.pool_label", POOL]
    done = head.run(sys.executable, "-m", "jobs.import_events", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "800 events, 0 quarantined" in done.stderr
    assert set(pools(head)) == {"cpu"}


def test_load_on_the_service_brings_up_a_replica_and_a_node_for_it(head: Head, tmp_path: Path) -> None:
    service = Service(head, build_world(tmp_path), *free_ports(1))
    service.deploy("checkpoints", max_replicas=2, target_ongoing_requests=1, upscale_delay_s=1)
    service.wait_for("RUNNING")
    assert pools(head) == ["cpu"]
    assert len(service.replicas()) == 1
    expected = {user: scores_of(service.ask(user)) for user in USERS}
    with asking(service, expected, num_clients=8):
        wait_until(lambda: len(service.replicas()) == 2, "no replica came up")
    assert pools(head) == ["cpu", "cpu"]
