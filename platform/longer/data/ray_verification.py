"""Verification with Ray: one task a bucket; then request ids, divided by their value, are looked for twice over all buckets."""

from typing import Any

import numpy as np
import ray

from longer.arrays import Int64
from longer.data.findings import BucketReport, Findings
from longer.data.ray_tasks import as_they_finish, task_options
from longer.data.verification import repeated
from longer.data.verified_files import Source, TableFile
from longer.data.verified_manifests import check_manifests
from longer.data.verified_tables import BucketVerifier
from longer.progress import track

_MAX_ID_PARTS = 16


def verify_tables(sequences: Source, requests: Source | None, verifier: BucketVerifier) -> BucketReport:
    """What is wrong in all buckets of both tables, and in what their manifests say of them."""
    asked = verifier.impressions.table.buckets if verifier.impressions else []
    buckets = sorted({file.bucket for source in (sequences, requests) if source for file in source.files}.union(asked))
    num_parts = min(len(buckets), _MAX_ID_PARTS)
    shared = ray.put(verifier)
    task: Any = ray.remote(_verify_bucket).options(num_returns=1 + num_parts, **task_options())
    started = {
        bucket: task.remote(
            shared, bucket, sequences.bucket(bucket), requests.bucket(bucket) if requests else (), num_parts
        )
        for bucket in buckets
    }
    report, of_buckets = BucketReport(Findings(verifier.max_shown), Findings(verifier.max_shown)), {}
    bucket_of = {refs[0]: bucket for bucket, refs in started.items()}
    for done in track(as_they_finish(bucket_of), len(buckets), "verify", "buckets"):
        part = ray.get(done)
        of_buckets[bucket_of[done]] = part.checked
        report.merge(part)
    count_twice: Any = ray.remote(_repeated_ids).options(**task_options())
    parts = [count_twice.remote(*(refs[1 + part] for refs in started.values())) for part in range(num_parts)]
    for ids in ray.get(parts):
        report.found.add("duplicate_request", np.ones(len(ids), bool), lambda row, ids=ids: f"request {ids[row]}")  # type: ignore[misc]
    shown = verifier.impressions.table.version if verifier.impressions else None
    check_manifests(sequences, requests, shown, verifier.promises.num_buckets, report, of_buckets)
    return report


def _verify_bucket(
    verifier: BucketVerifier,
    bucket: int,
    sequences: tuple[TableFile, ...],
    requests: tuple[TableFile, ...],
    num_parts: int,
) -> list[Any]:
    report, ids = verifier(bucket, sequences, requests)
    part = ids.view(np.uint64) % np.uint64(num_parts)
    return [report, *(ids[part == p] for p in range(num_parts))]


def _repeated_ids(*ids: Int64) -> Int64:
    return repeated(np.concatenate(ids))
