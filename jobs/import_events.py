"""Imports a log into the events table: python -m jobs.import_events --config configs/quickstart.yaml"""

from collections import Counter
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longer.config import Settings
from longer.data.events import check_rows, iso_time, write_events
from longer.datasets import complete_journey
from longer.errors import UserError
from longer.progress import say
from longer.runner import run_job
from longer.storage import TABLE_FORMAT, Table, Version, checked_output, fingerprint

_IMPORTERS = {"complete_journey": complete_journey}


def run(settings: Settings) -> Version:
    """The events table of the settings' log; its unfit rows are in the quarantine table with their reasons."""
    importer, schema = _IMPORTERS[settings.import_events.dataset], settings.event_schema
    paths = importer.locate(settings.import_events.source)
    inputs = importer.checksums(paths)
    chosen = settings.import_events.model_dump(mode="json", exclude={"source"})
    version_id = fingerprint("events", TABLE_FORMAT, chosen, inputs, schema.hash())
    table = Table(settings.path("tables", "events"))
    if published := table.reuse(version_id):
        say("import_events", f"version {version_id} is already built, nothing changed")
        return published
    table.claim()
    events, quarantined = check_rows(importer.read(paths), schema, datetime.now(UTC))
    manifest = {"schema_hash": schema.hash(), "settings": chosen, "inputs": inputs, "provenance": importer.PROVENANCE}
    num_rows = len(events) + len(quarantined)
    if not num_rows:
        raise UserError(f"{next(iter(paths.values()))}: the log has no events: import a log with at least one")
    say("import_events", importer.PROVENANCE)
    reasons = Counter(quarantined["reason"].to_pylist())
    _quarantine(settings, version_id, quarantined, {**manifest, "num_rows": len(quarantined), "reasons": dict(reasons)})
    if len(quarantined) > settings.import_events.max_quarantined_share * num_rows:
        reason, count = reasons.most_common(1)[0]
        raise UserError(
            f"import_events.max_quarantined_share={settings.import_events.max_quarantined_share}: {len(quarantined)} of "
            f"{num_rows} rows are unfit, {count} of them: {reason}; see {settings.path('tables', 'quarantine')}, "
            "then repair the log or raise the share"
        )
    if not len(events):
        raise UserError(
            f"{next(iter(paths.values()))}: no row of the log is fit: see {settings.path('tables', 'quarantine')}"
        )
    try:
        files = write_events(events, table.begin(version_id))
    except OSError:
        table.discard(version_id)
        raise
    first, last = pc.min_max(events["event_ts"].cast(pa.int64())).as_py().values()
    counts = {"num_rows": len(events), "num_quarantined": len(quarantined)}
    times = {"first_event_ts": iso_time(first), "watermark": iso_time(last)}
    version = table.publish(version_id, {**manifest, **counts, **times}, files)
    say("import_events", f"version {version_id}: {len(events)} events, {len(quarantined)} quarantined")
    return version


def _quarantine(settings: Settings, version_id: str, rows: pa.Table, manifest: dict) -> None:
    table = Table(settings.path("tables", "quarantine"))
    if table.reuse(version_id):
        return  # an earlier attempt got this far
    with checked_output(table.begin(version_id), "part-0.parquet") as sink:
        pq.write_table(rows, sink, compression="zstd")
    table.publish(version_id, manifest, [sink.data_file])


if __name__ == "__main__":
    run_job(__doc__, run, needs_ray=False)
