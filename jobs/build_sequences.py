"""Builds the sequence table, one row a user, and the item catalogue:

python -m jobs.build_sequences --config configs/quickstart.yaml
"""

from typing import Any

import pyarrow.compute as pc

from longer.config import Settings
from longer.data.events import iso_time
from longer.data.items import publish_items
from longer.data.ray_sequences import BucketWriter, EventReader, data_files, readable_files, write_sequences
from longer.data.sequences import KeepRule
from longer.data.tables import open_version
from longer.progress import say
from longer.runner import run_job
from longer.storage import TABLE_FORMAT, Table, Version, fingerprint


def run(settings: Settings) -> Version:
    """The sequence table of the served events; beside it, the catalogue of its items if items have features."""
    version = _sequences(settings)
    if settings.event_schema.features_of("item"):
        publish_items(settings.path("tables", "items"), version, settings.event_schema)
    return version


def _sequences(settings: Settings) -> Version:
    schema = settings.event_schema
    events = open_version(settings.path("tables", "events"), schema, None, "jobs.import_events")
    rule = KeepRule(settings.sequences.keep_events, settings.model.windows.stride_events)
    chosen = {**settings.sequences.model_dump(mode="json"), "stride_events": rule.stride_events}
    inputs: dict[str, Any] = {"events": events.id}
    files = readable_files(events, schema, True) if settings.sequences.skip_unreadable_files else events.files()
    if skipped := sorted(
        set(events.files()) - set(files)
    ):  # in the id: once they are restored, the table is built anew
        inputs["skipped"] = [file.removeprefix(events.path) for file in skipped]
    version_id = fingerprint("sequences", TABLE_FORMAT, chosen, inputs, schema.hash())
    table = Table(settings.path("tables", "sequences"))
    if published := table.reuse(version_id):
        say("build_sequences", f"version {version_id} is already built, nothing changed")
        return published
    if not settings.sequences.skip_unreadable_files:
        readable_files(events, schema, False)
    reader = EventReader(schema, rule, settings.sequences.num_buckets)
    writer = BucketWriter(schema, rule, table.begin(version_id), settings.sequences.row_group_users)
    try:
        stats = write_sequences(events, files, reader, writer)
    except BaseException:
        table.discard(version_id)
        raise
    counts = {name: pc.sum(stats[name]).as_py() for name in ("num_users", "num_events", "num_events_kept")}
    manifest = {
        "schema_hash": schema.hash(),
        "settings": chosen,
        "inputs": inputs,
        "num_rows": counts["num_users"],
        **counts,
        "num_skipped_files": len(skipped),
        "first_event_ts": iso_time(pc.min(stats["first_ts"]).as_py()),
        "watermark": iso_time(pc.max(stats["last_ts"]).as_py()),
    }
    version = table.publish(version_id, manifest, data_files(stats))
    say(
        "build_sequences", f"version {version_id}: {counts['num_users']} users, {counts['num_events_kept']} events kept"
    )
    return version


if __name__ == "__main__":
    run_job(__doc__, run)
