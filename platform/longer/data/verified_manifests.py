"""What the manifests of both tables say, against what their files held and against each other. No Ray."""

from collections import Counter
from typing import Any

from longer.data.events import iso_ms
from longer.data.findings import BucketReport
from longer.data.requests import SPLITS, asked_in, split_times
from longer.data.verification import time_text
from longer.data.verified_files import Source
from longer.storage import Version

NOT_CHECKED = (
    "the log that the tables were built from, events that came too late (num_too_late) or are no longer kept, skipped files, "
    "num_items, and which negatives were drawn"
)
"""What the tables themselves cannot show."""

_BUCKET_COUNTS = {"num_users": "users", "num_events": "events", "num_events_kept": "events kept"}


def check_manifests(
    sequences: Source,
    requests: Source | None,
    impressions: Version | None,
    num_buckets: int,
    report: BucketReport,
    of_buckets: dict[int, Counter[str]],
) -> None:
    """The manifests' statements against the rows counted in `report`, and in each bucket.

    Where rows and news were not merged, what the sequences hold is not known, and nothing is compared with it.
    """
    is_known = "unmerged" not in report.found.counts
    if sequences.version and is_known:
        _check_sequences(sequences, sequences.version.manifest, report, of_buckets)
    if requests and requests.version:
        stated = requests.version.manifest
        _check_requests(requests, stated, num_buckets, report)
        if sequences.version and stated["inputs"]["sequences"] == sequences.version.id:
            _check_made_from(requests, stated, sequences.version, impressions, report, is_known)


def _check_sequences(
    source: Source, stated: dict[str, Any], report: BucketReport, of_buckets: dict[int, Counter[str]]
) -> None:
    for name, counted in ({"num_rows": "users"} | _BUCKET_COUNTS).items():
        _check_count(source, name, stated.get(name), report.checked[counted], report)
    records = {record["bucket"]: record for record in stated.get("buckets", [])}
    for bucket in sorted(records | of_buckets):
        record, checked = records.get(bucket, {}), of_buckets.get(bucket, Counter())
        for name, counted in _BUCKET_COUNTS.items():
            _check_count(source, f"{name} of bucket {bucket:04d}", record.get(name), checked[counted], report)
    if report.checked["events kept"]:
        first_ms, last_ms = _milliseconds(stated.get("first_event_ts")), _milliseconds(stated.get("watermark"))
        if last_ms != report.newest_ms:
            _contradict(source, "watermark", stated.get("watermark"), time_text(report.newest_ms), report)
        if first_ms is None or first_ms > report.oldest_ms:
            _contradict(source, "first_event_ts", stated.get("first_event_ts"), time_text(report.oldest_ms), report)


def _check_requests(source: Source, stated: dict[str, Any], num_buckets: int, report: BucketReport) -> None:
    _check_count(source, "num_rows", stated.get("num_rows"), report.checked["requests"], report)
    for name, counted in {"num_requests": "requests of", "num_candidates": "candidates of"}.items():
        for split in SPLITS:
            number = stated.get(name, {}).get(split)
            _check_count(source, f"{name}.{split}", number, report.checked[f"{counted} {split}"], report)
    if stated.get("num_buckets") != num_buckets:
        _contradict(source, "num_buckets", stated.get("num_buckets"), f"{num_buckets} of the sequences", report)
    num_cut, share = stated.get("num_cut", 0), stated["settings"]["max_cut_share"]
    if num_cut > share * (report.checked["requests"] + num_cut):
        _contradict(source, "num_cut", num_cut, f"at most the share {share} that max_cut_share allows", report)


def _check_made_from(
    source: Source,
    stated: dict[str, Any],
    made_from: Version,
    impressions: Version | None,
    report: BucketReport,
    is_known: bool,
) -> None:
    """What follows from the sequences and the impressions that the requests name."""
    sequences = made_from.manifest
    if is_known:
        if impressions:
            for name, counted in (("num_cut", "requests cut"), ("num_later", "requests later")):
                _check_count(source, name, stated.get(name), report.checked[counted], report)
        elif "impressions" not in stated["inputs"]:  # every group of events kept is a request, or was cut and counted
            num_cut = report.checked["request groups"] - report.checked["requests"]
            _check_count(source, "num_cut", stated.get("num_cut"), num_cut, report)
        not_kept = report.checked["events"] - report.checked["events kept"]
        _check_count(source, "num_events_not_kept", stated.get("num_events_not_kept"), not_kept, report)
    if stated.get("watermark") != sequences.get("watermark"):
        _contradict(
            source, "watermark", stated.get("watermark"), f"{sequences.get('watermark')} of the sequences", report
        )
    spans = [version.manifest for version in (impressions or made_from, made_from)]
    if None in [_milliseconds(span.get(name)) for span in spans for name in ("first_event_ts", "watermark")]:
        return
    if "impressions" in stated["inputs"] and impressions is None:
        return
    asked = stated["settings"]
    splits = split_times(*asked_in(made_from, impressions), asked["validation_days_share"], asked["test_days_share"])
    due = {"valid_from": splits.valid_from_ms, "test_from": splits.test_from_ms} if splits else {}
    for name, due_ms in due.items():
        if _milliseconds(stated.get(name)) != due_ms:
            _contradict(source, name, stated.get(name), f"{time_text(due_ms)} by its settings", report)


def _check_count(source: Source, name: str, stated: Any, held: int, report: BucketReport) -> None:
    if stated != held:
        report.found.add_one("row_count", f"{source.title}: {name} is {stated}, the files hold {held}")


def _contradict(source: Source, name: str, stated: Any, due: str, report: BucketReport) -> None:
    report.found.add_one("manifest", f"{source.title}: {name} is {stated}, not {due}")


def _milliseconds(iso: Any) -> int | None:
    """None of what is no time."""
    try:
        return iso_ms(iso)
    except (TypeError, ValueError):
        return None
