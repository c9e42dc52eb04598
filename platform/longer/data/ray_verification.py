"""Verification with Ray: one task a bucket; then request ids, divided by their value, are looked for twice over all buckets."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import ray

from longer.arrays import Int64
from longer.data.findings import Findings
from longer.data.ray_tasks import data_nodes
from longer.data.verification import repeated
from longer.data.verified_tables import BucketReport, BucketVerifier, Source, TableFile
from longer.progress import track

_MAX_ID_PARTS = 16


def verify_tables(sequences: Source, requests: Source | None, verifier: BucketVerifier) -> BucketReport:
    """What is wrong in all buckets of both tables, and their manifests' counts against the rows."""
    buckets = sorted({file.bucket for source in (sequences, requests) if source for file in source.files})
    num_parts = min(len(buckets), _MAX_ID_PARTS)
    task: Any = ray.remote(_verify_bucket).options(num_returns=1 + num_parts, label_selector=data_nodes())
    started = [
        task.remote(verifier, bucket, sequences.bucket(bucket), requests.bucket(bucket) if requests else (), num_parts)
        for bucket in buckets
    ]
    report = BucketReport(Findings(verifier.max_shown), Findings(verifier.max_shown))
    for refs in track(_as_they_come(started), len(buckets), "verify", "buckets"):
        report.merge(ray.get(refs[0]))
    count_twice: Any = ray.remote(_repeated_ids).options(label_selector=data_nodes())
    parts = [count_twice.remote(*(refs[1 + part] for refs in started)) for part in range(num_parts)]
    for ids in ray.get(parts):
        report.found.add("duplicate_request", np.ones(len(ids), bool), lambda row, ids=ids: f"request {ids[row]}")  # type: ignore[misc]
    _check_counts(sequences, _SEQUENCE_COUNTS, report)
    if requests:
        _check_counts(requests, _REQUEST_COUNTS, report)
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


def _as_they_come(started: list[list[ray.ObjectRef]]) -> Iterable[list[ray.ObjectRef]]:
    pending = {refs[0]: refs for refs in started}
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1)
        yield pending.pop(done[0])


_SEQUENCE_COUNTS = {"num_rows": "users", "num_events": "events", "num_events_kept": "events kept"}
_REQUEST_COUNTS = {"num_rows": "requests", "num_requests": "requests of", "num_candidates": "candidates of"}


def _check_counts(source: Source, names: dict[str, str], report: BucketReport) -> None:
    """The manifest's row counts, those by split too, against what the files held."""
    for name, counted in names.items():
        stated = source.version.manifest.get(name) if source.version else None
        by_split = stated if isinstance(stated, dict) else {}
        pairs = {f"{name}.{split}": (n, f"{counted} {split}") for split, n in by_split.items()}
        pairs = pairs or ({name: (stated, counted)} if stated is not None else {})
        for field, (number, key) in pairs.items():
            if number != report.checked[key]:
                text = f"{source.title}: {field} is {number}, the files hold {report.checked[key]}"
                report.found.add_one("row_count", text)
