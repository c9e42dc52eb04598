"""On a cluster of three nodes, the head and one for each label, work without GPUs stays off the GPU node and the head."""

import json
import sys
from collections.abc import Iterator

import pytest

from longer.config import RaySettings
from tests.cluster.nodes import Head, running_head

POOL = "longer.pool"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head("--num-cpus=0", "--labels", f"{POOL}=head") as started:
        started.add_node("--num-cpus=2", "--labels", f"{POOL}=cpu")
        started.add_node("--num-cpus=2", "--num-gpus=2", "--labels", f"{POOL}=gpu")
        yield started


def test_without_a_label_nothing_is_asked_for_and_work_runs_anywhere() -> None:
    assert RaySettings().place(0) == RaySettings().place(1) == {}


_SCRIPT = """
import json, sys, time
import ray, ray.data, ray.train
from ray.train import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from longer.config import RaySettings
from longer.data.ray_tasks import each
from longer.runner import start_ray

address, label, folder = sys.argv[1:]
settings = RaySettings(address=address, pool_label=label)
start_ray(settings)

def pool(_=None):
    time.sleep(0.2)
    return ray.get_runtime_context().get_node_labels()[label]

class Scorer:
    def __call__(self, rows):
        return {"pool": [pool()]}

def scored(num_gpus):
    rows = ray.data.from_items([{"bucket": 0}]).map_batches(
        Scorer, batch_size=1, num_cpus=1, num_gpus=num_gpus or None, label_selector=settings.place(num_gpus),
        compute=ray.data.ActorPoolStrategy(size=1))
    return rows.take_all()[0]["pool"]

def worker(config):
    ray.get(config["seen"].add.remote(pool()))

@ray.remote(num_cpus=0)
class Seen:
    def __init__(self): self.pools = []
    def add(self, pool): self.pools.append(pool)
    def take(self): return self.pools

def trained(use_gpu):
    seen = Seen.remote()
    scaling = ScalingConfig(num_workers=1, use_gpu=use_gpu, label_selector=settings.place(use_gpu))
    DataParallelTrainer(worker, train_loop_config={"seen": seen}, scaling_config=scaling,
        run_config=ray.train.RunConfig(storage_path=folder)).fit()
    return ray.get(seen.take.remote())

print(json.dumps({
    "each": sorted(set(each(pool, range(8), 8, "pools", "tasks"))),
    "data": sorted({row["pool"] for row in ray.data.range(8, override_num_blocks=8).map(lambda row: {"pool": pool()}).take_all()}),
    "scorer": [scored(0), scored(1)],
    "training": [trained(False), trained(True)],
}))
"""


@pytest.mark.ray
def test_each_kind_of_work_runs_on_the_nodes_for_it(head: Head, tmp_path) -> None:
    done = head.run(sys.executable, "-c", _SCRIPT, head.address, POOL, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "each": ["cpu"],
        "data": ["cpu"],
        "scorer": ["cpu", "gpu"],
        "training": [["cpu"], ["gpu"]],
    }
