"""Writes a synthetic log into the events table: python -m jobs.generate_events --root runs/synthetic"""

from longer.config import Settings
from longer.data.events import iso_time
from longer.datasets.generator import PROVENANCE, check_schema
from longer.datasets.ray_generator import write_log
from longer.progress import say
from longer.runner import run_job
from longer.storage import TABLE_FORMAT, DataFile, Table, Version, fingerprint


def run(settings: Settings) -> Version:
    """The events table of the settings' synthetic log, the same for the same settings and seed."""
    schema = settings.event_schema
    check_schema(schema)
    chosen = {**settings.generate.model_dump(mode="json"), "seed": settings.seed}
    version_id = fingerprint("generated_events", TABLE_FORMAT, chosen, schema.hash())
    table = Table(settings.path("tables", "events"))
    if published := table.reuse(version_id):
        say("generate_events", f"version {version_id} is already built, nothing changed")
        return published
    version_path = table.begin(version_id)
    try:
        stats = write_log(settings.generate, settings.seed, schema, version_path)
    except BaseException:
        table.discard(version_id)
        raise
    manifest = {
        "schema_hash": schema.hash(),
        "settings": chosen,
        "inputs": {},
        "provenance": PROVENANCE,
        "num_rows": sum(file["num_events"] for file in stats),
        "num_quarantined": 0,
        "first_event_ts": iso_time(min(file["first_ts"] for file in stats)),
        "watermark": iso_time(max(file["last_ts"] for file in stats)),
    }
    files = [DataFile(file["path"], file["num_bytes"], file["sha256"]) for file in stats]
    version = table.publish(version_id, manifest, files)
    say("generate_events", f"version {version_id}: {manifest['num_rows']} events in {len(files)} files")
    return version


if __name__ == "__main__":
    run_job(__doc__, run)
