"""Builds the sequence table, one row a user, and the item catalogue:

python -m jobs.build_sequences --config configs/quickstart.yaml [--since-last]
"""

from typing import Any

from longer.config import Settings
from longer.data.build_plan import BuildPlan, plan_build
from longer.data.events import iso_time
from longer.data.items import publish_items
from longer.data.ray_sequences import Build, Record, readable_files, write_sequences
from longer.data.tables import open_version
from longer.errors import UserError
from longer.progress import say
from longer.runner import run_job, user_error_in
from longer.storage import DataFile, Table, Version, remove_tree

_COUNTS = ("num_users", "num_events", "num_events_kept")


def run(settings: Settings, since_last: bool = False) -> Version:
    """The sequence table of the served events; beside it, the catalogue of its items if items have features.

    With `since_last`, the last version with the events merged in that have come since.
    """
    version = _sequences(settings, since_last)
    if settings.event_schema.features_of("item"):
        publish_items(settings.path("tables", "items"), version, settings.event_schema)
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
    if not plan.files:
        raise UserError(f"{events.path}: no readable event file: import a log with at least one event")
    rows_of = rows_of or readable_files(plan.files, schema, False)
    build = Build(plan, schema, table.resume(plan.version_id))
    try:
        written, num_too_late = write_sequences(build, {path: rows_of[path] for path in plan.files})
    except Exception as error:
        if user_error_in(error):  # otherwise a rerun goes on from what is there
            table.discard(plan.version_id)
        raise
    version = table.publish(plan.version_id, *_content(plan, written, num_too_late))
    remove_tree(build.scratch)
    counts, late = version.manifest, f", {num_too_late} events came too late" if num_too_late else ""
    say(
        "build_sequences",
        f"version {version.id}: {counts['num_users']} users, {counts['num_events_kept']} events kept{late}",
    )
    return version


def _content(plan: BuildPlan, written: list[Record], num_too_late: int) -> tuple[dict[str, Any], list[DataFile]]:
    """The manifest and the files of the version: the buckets written, and those that the last version's news left alone."""
    base = plan.base.manifest if plan.base else {"buckets": [], "num_too_late": 0}
    counts = {record["bucket"]: record for record in base["buckets"]}
    files = plan.base_files()
    for record in written:
        files[record["bucket"]] = DataFile(**record["file"])
        counts[record["bucket"]] = {
            name: value for name, value in record.items() if name not in ("file", "num_too_late")
        }
    buckets = [counts[bucket] for bucket in sorted(counts)]
    totals = {name: sum(bucket[name] for bucket in buckets) for name in _COUNTS}
    manifest = {
        "schema_hash": plan.schema_hash,
        "settings": plan.settings,
        "inputs": plan.inputs,
        "num_rows": totals["num_users"],
        **totals,
        "num_too_late": base["num_too_late"] + num_too_late,
        "num_skipped_files": len(plan.inputs.get("skipped", [])),
        "first_event_ts": iso_time(min(bucket["first_ts"] for bucket in buckets)),
        "watermark": iso_time(max(bucket["last_ts"] for bucket in buckets)),
        "buckets": buckets,
    }
    return manifest, list(files.values())


if __name__ == "__main__":
    run_job(__doc__, run, flags=(("since-last", "merge what has come since the last version into it"),))
