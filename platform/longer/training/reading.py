"""The requests of a run, read once in parts by many tasks, where workers can be, for the workers of any node to lay out and map."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from longer.arrays import Int64
from longer.config import Settings
from longer.errors import StorageError, UserError
from longer.progress import say
from longer.training.content import Job, Looked, Tables
from longer.training.keepers import Keepers
from longer.training.loader import Part
from longer.training.mapped import Name, ReadParts, RequestFiles, num_bytes

_PART_BYTES = 64 << 20
"""Of the tables' files that one task reads: they take several times as much in memory."""

_WAIT_IS_TOLD_AFTER_S = 30.0
_WAIT_ENDS_AFTER_S = 900.0
"""A node with a GPU takes minutes to come up; a pool that nobody has never does."""


@contextmanager
def request_files(job: Job) -> Iterator[RequestFiles]:
    """The requests of a job, read once however often workers start, until the block ends; or an error is raised here.

    Parts are contiguous buckets and lie in their order, so that what they make does not depend on how many there are. Whoever
    reads or lays out holds one part; Ray keeps them all until the end, on disk if need be, for nodes that come later.
    """
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # no other node's end takes it along
    keepers = Keepers.options(label_selector=here).remote()  # type: ignore[attr-defined]
    try:
        read = _read(job)
        say(
            "train",
            f"requests and histories take {read.num_bytes / 2**20:,.0f} MiB on the disk of each node with workers",
        )
        yield RequestFiles(read, keepers)
    finally:
        ray.kill(keepers)


def _read(job: Job) -> ReadParts:
    settings, tables = job.settings, Tables.of(job)
    node = _node_with_a_core(settings)
    retries: dict[str, Any] = {"max_retries": settings.train.max_failures, "retry_exceptions": [StorageError]}
    groups = in_groups(tables.bucket_bytes(), _PART_BYTES)
    parts, told = zip(*_parts(tables, groups, retries, node), strict=True)
    sizes, nones, looked = zip(*ray.get([*told]), strict=True)
    tables.check(looked)
    room = {name: sum(size[name] for size in sizes) for name in sizes[0]}
    return ReadParts([*parts], nones[0], room, settings.ray.scratch)


def in_groups(num_bytes_K: Int64, most_bytes: int) -> list[list[int]]:
    """All buckets in order, in groups of about so many bytes, or of one bucket that has more."""
    group_K = (np.cumsum(num_bytes_K) - num_bytes_K) // most_bytes
    return [group.tolist() for group in np.split(np.arange(len(group_K)), np.flatnonzero(np.diff(group_K)) + 1)]


def _parts(tables: Tables, groups: list[list[int]], retries: dict[str, Any], node: str) -> list[list[ray.ObjectRef]]:
    """What each group's buckets hold, and what there is to tell of it.

    Read on the nodes of the workers' pool in turn, on as many cores as these have; `node` is one of them, in whose place Ray finds
    another should all be gone.
    """
    settings = tables.job.settings
    nodes = _nodes_of(settings.ray.place(settings.train.use_gpu))
    cores = [(core, one["NodeID"]) for one in nodes for core in range(int(one["Resources"]["CPU"]))]
    turns = [name for _, name in sorted(cores)] or [node]  # every node's first core before any one's second
    parts: list[list[ray.ObjectRef]] = []
    running: list[ray.ObjectRef] = []
    for number, group in enumerate(groups):
        if len(running) >= len(turns):
            _, running = ray.wait(running, fetch_local=False)
        options = task_options(settings, turns[number % len(turns)])
        read: Any = ray.remote(**options, **retries, num_returns=2)(_read_part)
        parts.append(read.remote(tables, group))
        running.append(parts[-1][0])
    return parts


def _read_part(tables: Tables, buckets: list[int]) -> tuple[Part, tuple[dict[Name, int], Part, list[Looked]]]:
    part = tables.read(buckets)
    return part, (num_bytes(part), part.none(), tables.look(part))


def task_options(settings: Settings, node: str | None = None) -> dict[str, Any]:
    """Ray's options of a task where the workers will be, which need what is read, and where else perhaps no node is.

    On a node that is known to have cores it asks for none: lost with the node, what was read is read anew elsewhere, where workers
    may have them all.
    """
    where = {"label_selector": settings.ray.place(settings.train.use_gpu)}
    if node is None:
        return {"num_cpus": 1, **where}
    return {"num_cpus": 0, **where, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


def _node_with_a_core(settings: Settings) -> str:
    """The id of a node of the workers' pool, which comes up if need be; never a head that has no core for tasks."""
    selector = settings.ray.place(settings.train.use_gpu)
    task: Any = ray.remote(**task_options(settings))(_node_here)
    found = task.remote()
    labels = "".join(f" --labels {name}={value}" for name, value in selector.items())
    wanted = f"a node of `ray start --num-cpus=N{labels}`"
    if not ray.wait([found], timeout=_WAIT_IS_TOLD_AFTER_S)[0]:
        say("train", f"waiting for a free CPU of {wanted}")
        if not ray.wait([found], timeout=_WAIT_ENDS_AFTER_S)[0] and not _nodes_of(selector):
            ray.cancel(found)
            raise UserError(
                f"ray.pool_label={settings.ray.pool_label}: this cluster has no node that may read the tables and train: start "
                f"{wanted}, or change ray.pool_label"
            )
    return ray.get(found)


def _node_here() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _nodes_of(selector: dict[str, str]) -> list[dict[str, Any]]:
    """Nodes of a pool that tasks may run on, busy or not."""
    return [
        node
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1 and selector.items() <= node["Labels"].items()
    ]
