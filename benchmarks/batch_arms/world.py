"""A generated log in which all users are alike, its tables by the platform's own jobs, and a model of random weights."""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.batch_arms.newest import build_newest_requests
from jobs import build_sequences, generate_events
from longer.batch_settings import BatchSettings
from longer.config import Settings, load_settings
from longer.files import remove_tree
from longer.model.longer import Longer
from longer.serving.batch import batch_score
from longer.serving.batch_plan import plan_scores
from longer.storage import Table, Version, fingerprint
from longer.training.checkpoints import save_weights, weights_of

NUM_DAYS = 60
CATALOGUE_ZIPF_EXPONENT = 0.5
"""Flat enough that the log has all items of a large catalogue."""

_EVENTS_PER_BUCKET = 1 << 20
"""As `jobs.build_sequences` chooses for large tables."""

_IN_NAME = ("history_events", "merge_size", "query_groups", "event_width", "self_layers", "users", "requests_per_user")
_IN_NAME += ("negatives", "items", "catalogue_items", "seed")


def settings_of(asked: argparse.Namespace, num_actors: int) -> Settings:
    """All jobs' settings. Test requests are the newest events, so that each has a full history before it."""
    events_per_user = asked.history_events + asked.requests_per_user
    num_items, exponent = asked.items, 1.0
    if asked.catalogue_items:
        num_items, exponent = asked.catalogue_items, CATALOGUE_ZIPF_EXPONENT
    sizes = {name: getattr(asked, name) for name in ("history_events", "merge_size", "query_groups", "event_width")}
    model = {**sizes, "stride_groups": asked.query_groups // 2, "num_self_layers": asked.self_layers}
    return load_settings(
        overrides={
            "root": f"{os.path.abspath(asked.data)}/{fingerprint([getattr(asked, name) for name in _IN_NAME])}",
            "seed": asked.seed,
            "event_schema": {"features": [{"name": "category", "kind": "categorical", "of": "item"}]},
            "generate": {
                "num_users": asked.users,
                "num_events": asked.users * events_per_user,
                "num_items": num_items,
                "num_days": max(NUM_DAYS, math.ceil(events_per_user / asked.requests_per_user)),
                "user_zipf_exponent": 0,
                "item_zipf_exponent": exponent,
            },
            "sequences": {
                "keep_events": 2 * events_per_user,
                "num_buckets": max(4 * num_actors, asked.users * events_per_user // _EVENTS_PER_BUCKET),
            },
            "requests": {
                "negatives_per_positive": asked.negatives,
                "test_days_share": asked.requests_per_user / events_per_user,
            },
            "model": model,
            "batch_score": pool_of(asked, num_actors),
            "ray": {
                "num_cpus": max(4, num_actors + 2, num_cores()),
                "object_store_bytes": (8 if asked.device == "cuda" else 1) << 30,
            },
        }
    )


def num_cores() -> int:
    """That this process may use, in a container too."""
    quota, limit = Path("/sys/fs/cgroup/cpu.max"), len(os.sched_getaffinity(0))
    if quota.exists():
        share, period = quota.read_text().split()
        limit = limit if share == "max" else min(limit, max(1, int(share) // int(period)))
    return limit


def pool_of(asked: argparse.Namespace, num_actors: int) -> dict[str, Any]:
    num_gpus = 1 / asked.scorers if asked.device == "cuda" else 0
    return {
        "concurrency": (num_actors, num_actors),
        "num_gpus_per_scorer": num_gpus,
        "batch_bytes": asked.batch_bytes,
        "precision": asked.precision,
    }


def make_tables(settings: Settings, with_requests: bool) -> None:
    generate_events.run(settings)
    build_sequences.run(settings)
    if with_requests:
        build_newest_requests(settings)
    torch.manual_seed(settings.seed)
    model = Longer(settings.model, settings.event_schema, settings.train.tasks)
    table, version_id = Table(settings.path("checkpoints")), fingerprint("random", settings.seed)
    if table.reuse(version_id) is None:
        path = table.begin(version_id)
        version = save_weights(path, weights_of(model), settings.model, settings.event_schema, settings.train.tasks)
        table.publish(version_id, {"schema_hash": settings.event_schema.hash(), "model_version": version})


def fresh_run(settings: Settings, chosen: BatchSettings) -> Version:
    """A run of the job, though an earlier one may have done the same."""
    asked = settings.model_copy(update={"batch_score": chosen})
    remove_tree(plan_scores(asked).table_path)
    return batch_score(asked)


def users_file(settings: Settings, num_users: int) -> str:
    """Names the first users of the log."""
    path = settings.path(f"users-{num_users}.parquet")
    pq.write_table(pa.table({"user_id": np.arange(1, num_users + 1)}), path)
    return path


def items_file(settings: Settings, num_items: int) -> str:
    """Names the most popular items of the log."""
    path = settings.path(f"candidates-{num_items}.parquet")
    pq.write_table(pa.table({"item_id": np.arange(1, num_items + 1)}), path)
    return path


def scoring_seconds(version: Version) -> float:
    """What a run took from the first bucket begun: without the start of Ray, its actors, and their kernels.

    On a CPU, of its actors' processes: other work on the machine does not count.
    """
    told = version.manifest
    return told["cpu_s"] - told["start_cpu_s"] if told["device"] == "cpu" else told["seconds"] - told["start_s"]
