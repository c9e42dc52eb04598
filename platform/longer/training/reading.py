"""The requests of a run in Ray's memory: read in parts by many tasks, where workers can be, and lent to all workers of a node."""

import pickle
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from longer.arrays import Int64
from longer.config import Settings
from longer.errors import StorageError, UserError
from longer.progress import say
from longer.training.content import Job, Tables
from longer.training.loader import Part

_PART_BYTES = 64 << 20
"""Of the tables' files that one task reads: they take several times as much in memory."""

_WAIT_IS_TOLD_AFTER_S = 30.0
_WAIT_ENDS_AFTER_S = 900.0
"""A node with a GPU takes minutes to come up; a pool that nobody has never does."""


def requests_in_memory(job: Job) -> ray.ObjectRef:
    """The requests of a job, read once however often workers start; they are there, or an error is raised here.

    Parts are contiguous buckets and joined in their order, so that what they make does not depend on how many there are. A task
    that reads holds one part. The one that joins them, on a node where workers can be, makes the whole in its own memory, beside
    the parts in that node's object store, and then stores it there too: for a moment there are three of it.
    """
    settings, tables = job.settings, Tables.of(job)
    node = _node_with_a_core(settings)
    retries: dict[str, Any] = {"max_retries": settings.train.max_failures, "retry_exceptions": [StorageError]}
    groups = in_groups(tables.bucket_bytes(), _PART_BYTES)
    join: Any = ray.remote(**task_options(settings, node), **retries, num_returns=2)(_joined)
    requests, size = join.remote(tables, *_parts(tables, groups, retries, node))
    _tell_if_too_large(ray.get(size), settings)
    return requests


def in_groups(num_bytes_K: Int64, most_bytes: int) -> list[list[int]]:
    """All buckets in order, in groups of about so many bytes, or of one bucket that has more."""
    group_K = (np.cumsum(num_bytes_K) - num_bytes_K) // most_bytes
    return [group.tolist() for group in np.split(np.arange(len(group_K)), np.flatnonzero(np.diff(group_K)) + 1)]


def _parts(tables: Tables, groups: list[list[int]], retries: dict[str, Any], node: str) -> list[ray.ObjectRef]:
    """What each group's buckets hold, read on the nodes of the workers' pool in turn, on as many cores as these have.

    `node` is one of them, in whose place Ray finds another should all be gone.
    """
    settings = tables.job.settings
    nodes = _nodes_of(settings.ray.place(settings.train.use_gpu))
    cores = [(core, one["NodeID"]) for one in nodes for core in range(int(one["Resources"]["CPU"]))]
    turns = [name for _, name in sorted(cores)] or [node]  # every node's first core before any one's second
    parts: list[ray.ObjectRef] = []
    running: list[ray.ObjectRef] = []
    for number, group in enumerate(groups):
        if len(running) >= len(turns):
            _, running = ray.wait(running, fetch_local=False)
        options = task_options(settings, turns[number % len(turns)])
        read: Any = ray.remote(**options, **retries)(Tables.read)
        running.append(read.remote(tables, group))
        parts.append(running[-1])
    return parts


def _joined(tables: Tables, *parts: Part) -> tuple[Any, int]:
    read = tables.join(parts)
    return read, num_bytes(read)


def task_options(settings: Settings, node: str | None = None) -> dict[str, Any]:
    """Ray's options of a task where the workers will be, which need what is read, and where else perhaps no node is.

    On a node that is known to have cores it asks for none: lost with the node, what was read is read anew elsewhere, where workers
    may have them all.
    """
    where = {"label_selector": settings.ray.place(settings.train.use_gpu)}
    if node is None:
        return {"num_cpus": 1, **where}
    return {"num_cpus": 0, **where, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


def num_bytes(value: Any) -> int:
    """What a value takes in Ray's memory, but for what is small."""
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return sum(buffer.raw().nbytes for buffer in buffers)


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


def _tell_if_too_large(size: int, settings: Settings) -> None:
    """Ray keeps what does not fit in files: it works, slowly."""
    nodes = _nodes_of(settings.ray.place(settings.train.use_gpu))
    room = min((node["Resources"]["object_store_memory"] for node in nodes), default=size)
    if size > room:
        say(
            "train",
            f"requests and histories take {size / 2**30:.1f} GiB, a node's object store has {room / 2**30:.1f}: what is over "
            "lies on disk, where reading is slow: raise ray.object_store_bytes, or on a cluster `ray start "
            "--object-store-memory`",
        )
