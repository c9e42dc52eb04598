"""The test split: the model's metrics, the baselines' on the same rows, and every score in a table.

C candidates, T tasks.
"""

import functools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import ray
import torch

from longer.arrays import Int64, RequestBatch
from longer.config import RaySettings, Settings
from longer.data.batches import Requests
from longer.data.events import iso_ms
from longer.data.ray_tasks import as_they_finish
from longer.data.scores import score_rows
from longer.data.tables import RequestTable, SequenceTable
from longer.errors import UserError
from longer.files import write_bytes
from longer.model.inputs import to_tensors
from longer.model.outputs import to_scores
from longer.model.ranker import Ranker
from longer.progress import say, track
from longer.schema import EventSchema
from longer.storage import TABLE_FORMAT, Table, Version, checked_output, fingerprint
from longer.training.baselines import count_in_history, item_counts, popularity
from longer.training.checkpoints import CheckpointInfo, load_model
from longer.training.inputs import Inputs
from longer.training.lineage import later, pasts, unknown_bases
from longer.training.loader import read_split, score_split
from longer.training.metrics import auc, defined, gauc, shown_all
from longer.training.steps import task_metrics
from longer.training_settings import TaskSettings


@dataclass(frozen=True)
class BucketScores:
    """The rows of one bucket: outputs, labels and what the metrics and baselines need."""

    output_CT: npt.NDArray[np.float32]
    labels: dict[str, npt.NDArray[np.float32]]
    user_C: Int64
    item_C: Int64
    history_end_C: Int64
    counts: list[Int64]
    trained_items: tuple[Int64, Int64]
    num_requests: int


def evaluate(settings: Settings) -> Version:
    """Every score of the test split by the served checkpoint, published; the manifest holds the metrics and the baselines'.

    A finished evaluation is found and nothing changes.
    """
    inputs = Inputs.served(settings)
    checkpoint, requests = inputs.checkpoint, inputs.requests
    chosen = settings.evaluate.model_dump(mode="json")
    version_id = fingerprint("evaluation", TABLE_FORMAT, chosen, inputs.ids)
    table = Table(settings.path("evaluation"))
    if published := table.reuse(version_id):
        say("evaluate", f"version {version_id} is already there, nothing changed")
        return published
    if not requests.manifest["num_requests"]["test"]:
        raise UserError(
            f"{requests.path}: no requests in the test split: raise requests.test_days_share, build them again"
        )
    may_be_seen = _check_held_out(checkpoint, requests)
    _, info = load_model(
        checkpoint.path, expected_schema=settings.event_schema
    )  # mistakes are told here, not by every task
    train_end_ms = iso_ms(requests.manifest["valid_from"])
    scorer = BucketScorer(settings, inputs.ids, checkpoint.path, table.begin(version_id), train_end_ms)
    try:
        parts = list(_score_buckets(settings, scorer, requests.manifest["num_buckets"]))
        metrics = _metrics(settings, info.tasks, parts)
        write_bytes(f"{scorer.version_path}/metrics.json", json.dumps(metrics, indent=1).encode())
    except BaseException:
        table.discard(version_id)
        raise
    about = {
        "schema_hash": settings.event_schema.hash(),
        "settings": chosen,
        "inputs": inputs.ids,
        "model_version": checkpoint.manifest["model_version"],
        "test_may_be_seen": may_be_seen,
        "num_requests": sum(part.num_requests for part in parts),
        "num_rows": sum(len(part.item_C) for part in parts),
    }
    version = table.publish(version_id, {**about, **metrics})
    say("evaluate", f"version {version_id}: {shown_all(metrics['test_by_task'])}")
    return version


def _check_held_out(checkpoint: Version, requests: Version) -> bool:
    """A UserError if the test split has been trained, by the model or its tower; whether it may have been, which a line tells."""
    test_from = requests.manifest["test_from"]
    for name, past in pasts(checkpoint.path, checkpoint.manifest).items():
        if later(past["trained_until"], test_from) != test_from:
            raise UserError(
                f"{name} has trained requests until {past['trained_until']}, the test split starts at {test_from}: see each day's "
                "metrics from before it was trained in its manifest, or train without --continue and --from"
            )
    unknown = unknown_bases(checkpoint.manifest)
    if unknown:
        say(
            "evaluate",
            f"{checkpoint.path} comes from {', '.join(unknown)}, which does not say what it was trained on: metrics may be of "
            "requests that it has seen",
        )
    return bool(unknown)


@dataclass(frozen=True)
class BucketScorer:
    """Scores the test requests of a bucket and writes them under the version's path: what a Ray task runs."""

    settings: Settings
    inputs: dict[str, str]
    checkpoint_path: str
    version_path: str
    train_end_ms: int

    def score(self, bucket: int) -> BucketScores:
        torch.set_num_threads(1)
        settings, schema = self.settings, self.settings.event_schema
        model, info = _model(self.checkpoint_path, schema)
        sequences = SequenceTable(settings.path("tables", "sequences"), schema, self.inputs["sequences"])
        requests = RequestTable(settings.path("tables", "requests"), schema, self.inputs["requests"])
        data = read_split(sequences, requests, "test", info.model.windows, [bucket])
        asked, item_C = data.requests, data.requests.candidates.features["item_id"]
        output_CT = score_split(data, functools.partial(_outputs, model), len(info.tasks))
        if len(asked):
            self._write(bucket, asked, output_CT, info.tasks)
        history_end_C = np.repeat(asked.history_end_R, np.diff(asked.candidates.offsets_R1))
        last_events = [*settings.evaluate.count_baseline_events, None]
        return BucketScores(
            output_CT=output_CT,
            labels=asked.labels,
            user_C=np.repeat(asked.user_key_R, np.diff(asked.candidates.offsets_R1)),
            item_C=item_C,
            history_end_C=history_end_C,
            counts=count_in_history(data.histories, data.row_C, history_end_C, item_C, last_events),
            trained_items=item_counts(data.histories, self.train_end_ms),
            num_requests=len(asked),
        )

    def _write(
        self, bucket: int, requests: Requests, output_CT: npt.NDArray[np.float32], tasks: tuple[TaskSettings, ...]
    ) -> None:
        rows = score_rows(requests, to_scores(output_CT, tasks), self.settings.event_schema)
        with checked_output(self.version_path, f"bucket={bucket:04d}/part-0.parquet") as sink:
            pq.write_table(rows, sink, compression="zstd")


@functools.lru_cache(maxsize=1)
def _model(path: str, schema: EventSchema) -> tuple[Ranker, CheckpointInfo]:
    """Loaded once a worker process, which scores many buckets."""
    return load_model(path, expected_schema=schema)


@torch.inference_mode()
def _outputs(model: Ranker, batch: RequestBatch) -> npt.NDArray[np.float32]:
    return model(to_tensors(batch)).numpy()


def task_options(where: RaySettings) -> dict[str, Any]:
    """Ray's options of a task that scores a bucket: one thread each, and on a local Ray as many at a time as there are cores."""
    cores = len(os.sched_getaffinity(0))
    logical = max(1, int(ray.cluster_resources()["CPU"]) // cores) if where.cluster is None else 1
    return where.options(num_cpus=logical)


def _score_buckets(settings: Settings, scorer: BucketScorer, num_buckets: int) -> Iterator[BucketScores]:
    """One task a bucket."""
    task = ray.remote(**task_options(settings.ray))(BucketScorer.score)
    scored = as_they_finish([task.remote(scorer, bucket) for bucket in range(num_buckets)])
    return track(map(ray.get, scored), num_buckets, "evaluate", "buckets")


def _metrics(settings: Settings, tasks: tuple[TaskSettings, ...], parts: list[BucketScores]) -> dict[str, Any]:
    """Of the model's first task and of each; baselines and AUC by history length rank for the first binary task."""
    output_CT, user_C, item_C, history_end_C = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("output_CT", "user_C", "item_C", "history_end_C")
    )
    labels = {task.name: np.concatenate([part.labels[task.name] for part in parts]) for task in tasks}
    metrics = defined(task_metrics(output_CT, labels, user_C, tasks))
    result: dict[str, Any] = {
        "test": metrics[tasks[0].name],
        "test_by_task": metrics,
        "baselines": {},
        "auc_by_length": [],
    }
    binary = [index for index, task in enumerate(tasks) if task.kind == "binary"]
    if not binary:
        return result
    label_C = labels[tasks[binary[0]].name]
    names = [f"count_last_{last}" for last in settings.evaluate.count_baseline_events] + ["count_all"]
    scores: dict[str, npt.NDArray] = {"longer": output_CT[:, binary[0]]}
    scores["popularity"] = popularity([part.trained_items for part in parts], item_C)
    scores |= {name: np.concatenate([part.counts[i] for part in parts]) for i, name in enumerate(names)}
    result["baselines"] = defined(
        {
            name: {"auc": auc(score_C, label_C), "gauc": gauc(score_C, label_C, user_C)}
            for name, score_C in scores.items()
            if name != "longer"
        }
    )
    result["auc_by_length"] = _by_length(settings, scores, label_C, history_end_C)
    return result


def _by_length(
    settings: Settings, scores: dict[str, npt.NDArray], label_C: npt.NDArray, length_C: Int64
) -> list[dict[str, Any]]:
    """AUC of each score in bins of history length, in events; the last bin is open. Empty bins are left out."""
    edges = settings.evaluate.length_edges
    bin_C = np.searchsorted(edges, length_C, side="right") - 1
    return [
        {
            "from": edges[number],
            "to": edges[number + 1] if number + 1 < len(edges) else None,
            "rows": int((bin_C == number).sum()),
            "auc": {
                name: _or_none(auc(score_C[bin_C == number], label_C[bin_C == number]))
                for name, score_C in scores.items()
            },
        }
        for number in range(len(edges))
        if (bin_C == number).any()
    ]


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
