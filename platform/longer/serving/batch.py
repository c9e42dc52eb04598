"""Scores a split of the request table offline with Ray Data: one row a bucket, a pool of actors that each hold the model.

Each bucket becomes one file, written whole or not at all, under a version whose id is decided by everything that goes into
it. So an interrupted run keeps its finished buckets, and a finished run is found.
"""

import hashlib
import io
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch

from longer.arrays import RequestBatch
from longer.config import Settings
from longer.data.scores import check_difference, read_scores, score_rows
from longer.data.tables import RequestTable, SequenceTable
from longer.errors import UserError
from longer.model.inputs import to_tensors
from longer.model.outputs import to_scores
from longer.progress import say, track
from longer.storage import TABLE_FORMAT, DataFile, Table, Version, exists, fingerprint, read_bytes, write_bytes
from longer.training.checkpoints import load_model
from longer.training.inputs import Inputs
from longer.training.loader import read_split, score_split


class BucketScorer:
    """Writes the scores of the buckets it is given; one instance an actor, which loads the model once."""

    def __init__(self, settings: Settings, checkpoint_path: str, ids: dict[str, str], version_path: str) -> None:
        schema = self._schema = settings.event_schema
        self._split, self._version_path = settings.batch_score.split, version_path
        self._device = "cuda" if settings.batch_score.num_gpus_per_scorer else "cpu"
        self._model, _ = load_model(checkpoint_path, self._device, schema)
        self._sequences = SequenceTable(settings.path("tables", "sequences"), schema, ids["sequences"])
        self._requests = RequestTable(settings.path("tables", "requests"), schema, ids["requests"])

    def __call__(self, rows: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self.write_bucket(bucket) for bucket in rows["bucket"].to_pylist()])

    def write_bucket(self, bucket: int) -> dict[str, Any]:
        """Writes one bucket's file unless an earlier attempt has; its record, of 0 rows and no file if it has no requests."""
        file = f"bucket={bucket:04d}/part-0.parquet"
        path = f"{self._version_path}/{file}"
        content = read_bytes(path) if exists(path) else b""
        kept = _is_readable(content)
        content = content if kept else self._score_bucket(bucket)
        items = pq.read_table(io.BytesIO(content), columns=["item_id"])["item_id"].combine_chunks()
        if len(items) and not kept:
            write_bytes(path, content)
        return {
            "path": file,
            "num_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "num_rows": len(items),
            "num_candidates": len(items.flatten()),
            "kept": kept,
        }

    def _score_bucket(self, bucket: int) -> bytes:
        data = read_split(self._sequences, self._requests, self._split, self._model.windows, [bucket])
        output_CT = score_split(data, self._forward, len(self._model.tasks))
        rows = score_rows(data.requests, to_scores(output_CT, self._model.tasks), self._schema)
        sink = io.BytesIO()
        pq.write_table(rows, sink, compression="zstd")
        return sink.getvalue()

    @torch.inference_mode()
    def _forward(self, batch: RequestBatch) -> np.ndarray:
        return self._model(to_tensors(batch, self._device)).float().cpu().numpy()


def _is_readable(content: bytes) -> bool:
    """Whether these bytes are a whole file of scores: a damaged one is scored again."""
    try:
        pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError):
        return False
    return True


def batch_score(settings: Settings) -> Version:
    """The published scores of the settings' split by the served checkpoint; a finished run is found and nothing changes."""
    inputs, asked = Inputs.served(settings), settings.batch_score
    if not inputs.requests.manifest["num_requests"].get(asked.split):
        splits = ", ".join(inputs.requests.manifest["num_requests"])
        raise UserError(f"batch_score.split={asked.split}: no requests in it: choose one of {splits} that has some")
    table = Table(settings.path("batch_scores"))
    version_id = fingerprint("batch_scores", TABLE_FORMAT, inputs.ids, asked.split)
    if published := table.reuse(version_id):
        say("batch_score", f"version {version_id} is already scored, nothing changed")
        return published
    version_path = table.resume(version_id)
    started = time.perf_counter()
    records = _score_buckets(settings, inputs, version_path)
    seconds = time.perf_counter() - started
    fresh = sum(record["num_candidates"] for record in records if not record["kept"])
    manifest = {
        "schema_hash": settings.event_schema.hash(),
        "inputs": inputs.ids,
        "model_version": inputs.checkpoint.manifest["model_version"],
        "split": asked.split,
        "num_requests": sum(record["num_rows"] for record in records),
        "num_rows": sum(record["num_candidates"] for record in records),
        "seconds": seconds,
        "rows_per_s": fresh / seconds,
    }
    files = [DataFile(r["path"], r["num_bytes"], r["sha256"]) for r in records if r["num_rows"]]
    version = table.publish(version_id, manifest, files)
    say(
        "batch_score", f"version {version_id}: {manifest['num_rows']} candidates, {manifest['rows_per_s']:.0f} a second"
    )
    return version


def _score_buckets(settings: Settings, inputs: Inputs, version_path: str) -> list[dict[str, Any]]:
    """Records of every bucket, as the actors finish them."""
    num_buckets, asked = inputs.requests.manifest["num_buckets"], settings.batch_score
    buckets = ray.data.from_items([{"bucket": b} for b in range(num_buckets)], override_num_blocks=num_buckets)
    written = buckets.map_batches(
        BucketScorer,
        fn_constructor_args=(settings, inputs.checkpoint.path, inputs.ids, version_path),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(asked.num_scorers, num_buckets)),
        num_cpus=1,
        num_gpus=asked.num_gpus_per_scorer or None,
        label_selector=settings.ray.place(asked.num_gpus_per_scorer),
    )
    return list(track(written.iter_rows(), num_buckets, "batch score", "buckets"))


def check_against_online(settings: Settings, scored: Version) -> Version:
    """How far the batch scores are from those that the serving check got over HTTP: a record in the manifest, next to them.

    `max_abs_diff_vs_online` is null if no request was scored by both.
    """
    online = Table(settings.path("serving_check")).current()
    if online and online.manifest["inputs"] != scored.manifest["inputs"]:
        online = None
    table = Table(settings.path("batch_scores", "check"))
    version_id = fingerprint("batch_check", TABLE_FORMAT, scored.id, online and online.id)
    if published := table.reuse(version_id):
        return published
    record: dict[str, Any] = {
        "rows": scored.manifest["num_rows"],
        "rows_per_s": scored.manifest["rows_per_s"],
        "seconds": scored.manifest["seconds"],
        "max_abs_diff_vs_online": None,
        "compared_requests": 0,
    }
    if online:
        asked = read_scores(online)
        ours = read_scores(scored, asked["request_id"].to_numpy())
        diff, compared = check_difference(asked, ours, settings.train.tasks)
        record |= {"max_abs_diff_vs_online": diff if compared else None, "compared_requests": compared}
    about = {
        "schema_hash": settings.event_schema.hash(),
        "inputs": {"batch_scores": scored.id, "serving_check": online and online.id},
    }
    return table.publish(version_id, {**about, **record}, [])
