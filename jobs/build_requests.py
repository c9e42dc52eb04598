"""Builds training, validation and test requests: python -m jobs.build_requests --config configs/quickstart.yaml"""

from datetime import datetime

from longer.config import Settings
from longer.data.events import iso_time
from longer.data.items import read_items
from longer.data.ray_requests import RequestBuilder, build_catalogue, write_requests
from longer.data.requests import SplitTimes, split_times, with_features
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.progress import say
from longer.runner import run_job
from longer.storage import TABLE_FORMAT, Table, Version, fingerprint


def run(settings: Settings) -> Version:
    """The request table of the served sequences.

    Events that the sequence table no longer keeps make no request; the manifest counts them beside the cut windows.
    """
    schema, windows = settings.event_schema, settings.model.windows
    if len(schema.tasks) > 1:
        raise UserError(
            f"event_schema.tasks: {', '.join(schema.tasks)}: this job labels one task, whether the item was in the group: keep one"
        )
    histories = SequenceTable(settings.path("tables", "sequences"), schema)
    sequences = histories.version
    chosen = {**settings.requests.model_dump(mode="json"), "windows": vars(windows), "seed": settings.seed}
    inputs = {"sequences": sequences.id}
    version_id = fingerprint("requests", TABLE_FORMAT, chosen, inputs, schema.hash())
    table = Table(settings.path("tables", "requests"))
    if published := table.reuse(version_id):
        say("build_requests", f"version {version_id} is already built, nothing changed")
        return published
    splits = _split_times(settings, sequences)
    catalogue = build_catalogue(histories, splits)
    if schema.features_of("item"):
        items = read_items(settings.path("tables", "items"), sequences.id, schema)
        catalogue = with_features(catalogue, items, schema)
    builder = RequestBuilder(
        schema, splits, windows, settings.requests.negatives_per_positive, settings.seed, table.begin(version_id)
    )
    try:
        stats = write_requests(histories, builder, catalogue)
        num_kept = sum(stats["num_requests"].values())
        _check_cut(settings, stats["num_cut"], num_kept + stats["num_cut"])
    except BaseException:
        table.discard(version_id)
        raise
    files = stats.pop("files")
    manifest = {
        "schema_hash": schema.hash(),
        "settings": chosen,
        "inputs": inputs,
        "num_buckets": sequences.manifest["settings"]["num_buckets"],
        "num_rows": num_kept,
        **stats,
        "num_events_not_kept": sequences.manifest["num_events"] - sequences.manifest["num_events_kept"],
        "num_items": len(catalogue.items),
        "valid_from": iso_time(splits.valid_from_ms),
        "test_from": iso_time(splits.test_from_ms),
        "watermark": sequences.manifest["watermark"],
    }
    version = table.publish(version_id, manifest, files)
    counts = ", ".join(f"{number} {split}" for split, number in stats["num_requests"].items())
    say("build_requests", f"version {version_id}: {counts} requests, {stats['num_cut']} cut and left out")
    return version


def _split_times(settings: Settings, sequences: Version) -> SplitTimes:
    first, last = (
        int(datetime.fromisoformat(sequences.manifest[name]).timestamp() * 1000)
        for name in ("first_event_ts", "watermark")
    )
    asked = settings.requests
    splits = split_times(first, last, asked.validation_days_share, asked.test_days_share)
    if splits is None:
        raise UserError(
            f"requests.test_days_share={asked.test_days_share}, validation_days_share={asked.validation_days_share}: no day is "
            f"left to train on in a log from {iso_time(first)} to {iso_time(last)}: lower the shares or import more days"
        )
    return splits


def _check_cut(settings: Settings, num_cut: int, num_requests: int) -> None:
    if num_cut > settings.requests.max_cut_share * num_requests:
        raise UserError(
            f"sequences.keep_events={settings.sequences.keep_events}: {num_cut} of {num_requests} requests have a history window "
            "that the sequence table cut: raise keep_events, or allow their loss with requests.max_cut_share"
        )


if __name__ == "__main__":
    run_job(__doc__, run)
