"""Builds the sequence table, one row a user, and the item catalogue:

python -m jobs.build_sequences --config configs/quickstart.yaml [--since-last]
"""

from typing import Any

from longer.config import Settings
from longer.data.build_plan import BuildPlan, plan_build
from longer.data.events import iso_time
from longer.data.items import publish_items
from longer.data.ray_requests import build_items
from longer.data.ray_sequences import Build, Record, readable_files, write_sequences
from longer.data.tables import SequenceTable, open_version
from longer.errors import UserError
from longer.progress import say
from longer.runner import run_job, user_error_in
from longer.storage import DataFile, Table, Version, remove_tree

_COUNTS = ("num_users", "num_events", "num_events_kept")


def run(settings: Settings, since_last: bool = False) -> Version:
    """The sequence table of the served events; beside it, the catalogue of its items if items have features.

    With `since_last`, the last version with the events merged in that have come since.
    """
    version, schema = _sequences(settings, since_last), settings.event_schema
    if schema.features_of("item"):
        sequences = SequenceTable(settings.path("tables", "sequences"), schema, version.id)
        publish_items(settings.path("tables", "items"), version.id, schema, lambda: build_items(sequences))
    return version


def _sequences(settings: Settings, since_last: bool) -> Version:
    schema, asked = settings.event_schema, settings.sequences
    events = open_version(settings.path("tables", "events"), schema, None, "jobs.import_events")
    table = Table(settings.path("tables", "sequences"))
    base = table.current() if since_last else None
    if base and base.manifest["inputs"]["events"] == events.id:
        say("build_sequences", f"version {base.id} has all events, nothing changed")
        return base
    rows_of = readable_files(events.files(), schema, True) if asked.skip_unreadable_files else None
    plan = plan_build(settings, events, set(events.files()) - set(rows_of) if rows_of else set(), base)
    if published := table.reuse(plan.version_id):
        say("build_sequences", f"version {published.id} is already built, nothing changed")
        return published
    rows_of = rows_of or readable_files(plan.files, schema, False)
    if not base and not any(sum(rows_of[path]) for path in plan.files):
        raise UserError(f"{events.path}: the event log is empty: import a log with at least one event")
    build = Build(plan, schema, table.resume(plan.version_id))
    try:
        blocks, buckets = write_sequences(build, {path: rows_of[path] for path in plan.files})
    except Exception as error:
        if user_error_in(error):  # otherwise a rerun goes on from what is there
            table.discard(plan.version_id)
        raise
    version = table.publish(plan.version_id, *_content(plan, blocks, buckets))
    remove_tree(build.scratch)
    _tell(version, base)
    return version


def _content(plan: BuildPlan, blocks: list[Record], written: list[Record]) -> tuple[dict[str, Any], list[DataFile]]:
    """The manifest and the files of the version: the buckets written, and those of the last version that got no news."""
    last = plan.base.manifest if plan.base else {"buckets": [], "num_too_late": 0}
    files = [file for record in written for file in record["files"]]
    counts = {record["bucket"]: {name: record[name] for name in ("bucket", *_COUNTS)} for record in written}
    for bucket in last["buckets"]:
        if bucket["bucket"] not in counts:
            counts[bucket["bucket"]] = bucket
            kept = plan.base_files[bucket["bucket"]]
            files += [vars(file) for file in (kept.rows, kept.news) if file]
    totals = {name: sum(bucket[name] for bucket in counts.values()) for name in _COUNTS}
    first = [iso_time(block["first_ts"]) for block in blocks if block["num_events"]]
    newest = [iso_time(block["last_ts"]) for block in blocks if block["num_events"]]
    manifest = {
        "schema_hash": plan.schema_hash,
        "settings": plan.settings,
        "inputs": plan.inputs,
        "num_rows": totals["num_users"],
        **totals,
        "num_too_late": last["num_too_late"] + sum(record["num_too_late"] for record in [*blocks, *written]),
        "num_skipped_files": len(plan.inputs.get("skipped", [])),
        "first_event_ts": min(time for time in [*first, last.get("first_event_ts")] if time),
        "watermark": max(time for time in [*newest, last.get("watermark")] if time),
        "buckets": [counts[bucket] for bucket in sorted(counts)],
    }
    return manifest, [DataFile(**file) for file in files]


def _tell(version: Version, base: Version | None) -> None:
    counts = version.manifest
    late = counts["num_too_late"] - (base.manifest["num_too_late"] if base else 0)
    told = f"version {version.id}: {counts['num_users']} users, {counts['num_events_kept']} events kept"
    say("build_sequences", told + (f"; {late} events came too late and are left out" if late else ""))


if __name__ == "__main__":
    run_job(__doc__, run, flags=(("since-last", "merge what has come since the last version into it"),))
