"""What the jobs and the service ask Ray for, told by the functions that ask, and whether some kind of node has it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray.data import DataContext
from ray.train import ScalingConfig

from longer.config import RaySettings, Settings
from longer.data import ray_tasks
from longer.runner import _set_up_ray_data
from longer.serving.batch import scorer_options
from longer.training import evaluate, reading
from longer.training.run import worker_options
from serve_apps.scoring import ScoringArgs, replica_options
from tests.cluster.nodes import ROOT

Resources = dict[str, float]
OBJECT_STORE = 0.3  # Ray's share of a node's memory for it
READING = "the reading of the tables for training"
_PROCESS_BYTES = (
    2 << 30
)  # a worker with torch and Arrow, and a bucket or batch at work; docs/scaling.md has what was measured
_OF_ONE_MACHINE = {"pipeline", "serve", "serve_check"}
JOBS = sorted(f"jobs.{path.stem}" for path in (ROOT / "jobs").glob("[a-z]*.py") if path.stem not in _OF_ONE_MACHINE)
_OF_TABLES = {
    f"jobs.{name}"
    for name in (
        *("generate_events", "import_events", "import_impressions"),
        *("build_sequences", "build_requests", "verify"),
    )
}


@dataclass(frozen=True)
class Request:
    """Resources and labels that one task, actor or worker asks for; "memory" is what it takes, told to Ray or not."""

    resources: Resources
    labels: dict[str, str]


@dataclass(frozen=True)
class NodeType:
    """Resources and labels that a node of a kind has; `most` is how many there may be."""

    resources: Resources
    labels: dict[str, str]
    most: int

    def holds(self, request: Request) -> int:
        """How many such requests all nodes of this kind hold."""
        if any(self.labels.get(name) != value for name, value in request.labels.items()):
            return 0
        wanted = {name: amount for name, amount in request.resources.items() if amount}
        return self.most * int(min(self.resources.get(name, 0) // amount for name, amount in wanted.items()))

    @property
    def bytes_per_cpu(self) -> float:
        """Memory for each of as many processes as the node has CPUs, all busy at once."""
        return self.resources["memory"] / self.resources["CPU"]


def memory_for_work(of_a_node_bytes: float) -> float:
    """What Ray's object store leaves of a node's memory, in bytes."""
    return of_a_node_bytes * (1 - OBJECT_STORE)


def requests_of(module: str, settings: Settings) -> dict[str, tuple[Request, int]]:
    """By kind of work that a job starts: what one asks for, and how many run at a time at least."""
    where = settings.ray.model_copy(update={"address": "auto"})  # which `ray job submit` tells
    if module in _OF_TABLES:
        with _ray_data_of(where):
            return {"a task on tables": (_request(ray_tasks.task_options()), 1)}
    if module == "jobs.train":
        workers = _of_a_worker(worker_options(settings)), settings.train.num_workers
        return {"a training worker": workers, READING: (_request(reading.task_options(settings)), 1)}
    if module == "jobs.evaluate":
        return {"a bucket's evaluation": (_request(evaluate.task_options(where)), 1)}
    pool = {"jobs.batch_score": settings.batch_score, "jobs.export_embeddings": settings.export_embeddings}[module]
    request = _request(scorer_options(pool, where), _PROCESS_BYTES + pool.batch_bytes)
    return {"a scorer": (request, pool.concurrency[0])}


def request_of_replicas(args: ScoringArgs) -> tuple[Request, int]:
    """The same for the scoring service."""
    held_bytes = _PROCESS_BYTES + args.cache_bytes + args.events_bytes
    return _request(replica_options(args), held_bytes), args.max_replicas


def assert_on_nodes_for_it(request: Request, what: str) -> None:
    """Work with GPUs is for the nodes labelled for it, and all else for the others, but for what workers with GPUs read."""
    if what != READING:
        assert request.labels == {"longer.pool": "gpu" if request.resources.get("GPU") else "cpu"}, what


def _request(options: dict[str, Any], memory_bytes: int = _PROCESS_BYTES) -> Request:
    asked = dict(options)
    resources = {"CPU": asked.pop("num_cpus"), "GPU": asked.pop("num_gpus", 0), "memory": memory_bytes}
    request = Request(resources, asked.pop("label_selector"))
    asked.pop("runtime_env", None)  # which any node can make
    assert not asked, f"{asked}: nobody has looked at whether nodes have it"
    return request


def _of_a_worker(scaling: ScalingConfig) -> Request:
    resources = {**scaling._resources_per_worker_not_none, "memory": _PROCESS_BYTES}
    return Request(resources, scaling.label_selector)


@contextmanager
def _ray_data_of(where: RaySettings) -> Iterator[None]:
    """As `runner.start_ray` leaves Ray Data, whose tasks are placed by its context; as it was, after."""
    options = DataContext.get_current().execution_options
    before = options.label_selector
    _set_up_ray_data(where)
    try:
        yield
    finally:
        options.label_selector = before
