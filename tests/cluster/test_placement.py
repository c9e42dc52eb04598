"""On a cluster of three nodes, the head and one for each label, work without GPUs stays off the GPU node and the head."""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longer.config import RaySettings
from tests.cluster.nodes import ROOT, Head, running_head

POOL = "longer.pool"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head("--num-cpus=0", "--labels", f"{POOL}=head") as started:
        started.add_node("--num-cpus=2", "--labels", f"{POOL}=cpu")
        started.add_node("--num-cpus=2", "--num-gpus=2", "--labels", f"{POOL}=gpu")
        yield started


def test_without_a_label_nothing_is_asked_for_and_work_runs_anywhere() -> None:
    assert RaySettings().place(0) == RaySettings().place(1) == {}


_SAY_WHERE = {"worker_options", "options", "task_options", "scorer_options", "replica_options"}
_SAY_HOW_MUCH = {"num_cpus", "num_gpus", "resources", "memory", "label_selector"}
_PINNED = {
    "label_selector": "ray.io/node-id",
    "scheduling_strategy": "NodeAffinitySchedulingStrategy(node, soft=False)",
}
_START = {"ray.remote", "options", "TorchTrainer"}


def starts_of_work(file: Path) -> list[tuple[int, str]]:
    """Line and fault of each call that starts Ray work, or states resources, outside of the functions tested by requests.py."""
    source = file.read_text()
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    stating = {child for node in functions if node.name in _SAY_WHERE for child in ast.walk(node)}
    decorating = {node for kind in ast.walk(tree) for node in getattr(kind, "decorator_list", [])}
    configured = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "options"}
    faults = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node not in stating | decorating):
        name = ast.unparse(call.func)
        by_function = [ast.unparse(k.value).partition("(")[0].rpartition(".")[2] in _SAY_WHERE for k in call.keywords]
        names = {k.arg: k.value for k in call.keywords if isinstance(k.value, ast.Name)}
        pinned = any(_PINNED[name] in source for name in _PINNED.keys() & names)  # to the driver's node, or a worker's
        started = name in _START or (isinstance(call.func, ast.Attribute) and call.func.attr in _START)
        started = started and not any(k.arg == "method_name" for k in call.keywords)  # that asks a replica that runs
        in_pool = any(k.arg == "compute" for k in call.keywords)
        if ((started and call not in configured) or in_pool) and not any(by_function) and not pinned:
            faults.append((call.lineno, f"{name} does not say on which nodes"))
        stated = {k.arg for k in call.keywords} & _SAY_HOW_MUCH
        if stated and name != "ray.init" and not name.endswith(".place") and not pinned:
            faults.append((call.lineno, f"{name} states {stated} itself"))
    return faults


@pytest.mark.parametrize(
    "file",
    [path for room in ("platform", "jobs", "serve_apps") for path in sorted((ROOT / room).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_place_that_starts_ray_work_says_where_by_a_function_that_is_held_against_the_nodes(file: Path) -> None:
    assert starts_of_work(file) == []


_SCRIPT = """
import json, sys, time
import ray, ray.data, ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from longer.batch_settings import ScorerPool
from longer.config import Settings
from longer.data.ray_tasks import each
from longer.runner import start_ray
from longer.serving.batch import scorer_options
from longer.training.evaluate import task_options
from longer.training.run import worker_options

address, label, folder = sys.argv[1:]
settings = Settings.model_validate({"ray": {"address": address, "pool_label": label}})
start_ray(settings.ray)

def pool(_=None):
    time.sleep(0.2)
    return ray.get_runtime_context().get_node_labels()[label]

class Scorer:
    def __call__(self, rows):
        return {"pool": [pool()]}

def scored(num_gpus):
    rows = ray.data.from_items([{"bucket": 0}]).map_batches(
        Scorer, batch_size=1, compute=ray.data.ActorPoolStrategy(size=1),
        **scorer_options(ScorerPool(num_gpus_per_scorer=num_gpus), settings.ray))
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
    asked = settings.train.model_copy(update={"num_workers": 1, "use_gpu": use_gpu})
    scaling = worker_options(settings.model_copy(update={"train": asked}))
    DataParallelTrainer(worker, train_loop_config={"seen": seen}, scaling_config=scaling,
        run_config=ray.train.RunConfig(storage_path=folder)).fit()
    return ray.get(seen.take.remote())

print(json.dumps({
    "each": sorted(set(each(pool, range(8), 8, "pools", "tasks"))),
    "data": sorted({row["pool"] for row in ray.data.range(8, override_num_blocks=8).map(lambda row: {"pool": pool()}).take_all()}),
    "evaluation": sorted(set(ray.get([ray.remote(**task_options(settings.ray))(pool).remote() for _ in range(8)]))),
    "scorer": [scored(0), scored(1)],
    "training": [trained(False), trained(True)],
}))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_each_kind_of_work_runs_on_the_nodes_for_it(head: Head, tmp_path) -> None:
    done = head.run(sys.executable, "-c", _SCRIPT, head.address, POOL, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "each": ["cpu"],
        "data": ["cpu"],
        "evaluation": ["cpu"],
        "scorer": ["cpu", "gpu"],
        "training": [["cpu"], ["gpu"]],
    }
