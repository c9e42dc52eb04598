"""Builds training, validation and test requests: python -m jobs.build_requests --config configs/quickstart.yaml

With import_impressions.source they are what jobs.import_impressions has imported; else they are made from the events.
"""

from typing import Any

import pyarrow as pa

from longer.config import Settings
from longer.data.events import iso_ms, iso_time
from longer.data.items import read_items
from longer.data.ray_requests import (
    ImpressionBuilder,
    RequestBuilder,
    build_catalogue,
    write_requests,
    write_shown,
)
from longer.data.requests import SplitTimes, asked_in, split_times, with_features
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.progress import say
from longer.runner import run_job
from longer.storage import TABLE_FORMAT, Table, Version, fingerprint


def run(settings: Settings) -> Version:
    """The request table of the served sequences.

    Events that the sequence table no longer keeps make no request; the manifest counts them beside the cut windows.
    Splits are whole days of the span in which something is asked: that of impressions, up to the newest event, or of events.
    """
    schema, windows = settings.event_schema, settings.model.windows
    histories = _histories(settings)
    sequences = histories.version
    shown = _impressions(settings, histories)
    chosen = {**settings.requests.model_dump(mode="json"), "windows": vars(windows), "seed": settings.seed}
    inputs = {"sequences": sequences.id, **({"impressions": shown.version.id} if shown else {})}
    kind = "requests_of_impressions_by_their_days" if shown else "requests"
    version_id = fingerprint(kind, TABLE_FORMAT, chosen, inputs, schema.hash())
    table = Table(settings.path("tables", "requests"))
    if published := table.reuse(version_id):
        say("build_requests", f"version {version_id} is already built, nothing changed")
        return published
    first, last = asked_in(sequences, shown.version if shown else None)
    splits = _split_times(settings, first, last)
    path = table.begin(version_id)
    try:
        if shown:
            asked, until_ms = settings.import_impressions, iso_ms(sequences.manifest["watermark"])
            builder = ImpressionBuilder(histories, shown, asked.group_id, splits, windows, until_ms, path)
            stats = write_shown(builder, _items(settings, histories))
            stats["requests_until"] = iso_time(last)
        else:
            stats = _of_events(settings, histories, splits, path)
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
        "valid_from": iso_time(splits.valid_from_ms),
        "test_from": iso_time(splits.test_from_ms),
        "watermark": sequences.manifest["watermark"],
    }
    version = table.publish(version_id, manifest, files)
    counts = ", ".join(f"{number} {split}" for split, number in stats["num_requests"].items())
    later = f", {stats['num_later']} after the newest event left for later" if stats.get("num_later") else ""
    say("build_requests", f"version {version_id}: {counts} requests, {stats['num_cut']} cut and left out{later}")
    return version


def _histories(settings: Settings) -> SequenceTable:
    return SequenceTable(settings.path("tables", "sequences"), settings.event_schema)


def _impressions(settings: Settings, histories: SequenceTable) -> SequenceTable | None:
    """The impressions to make requests of, in the buckets of the histories; None: they are made from the events."""
    schema = settings.event_schema
    if settings.import_impressions.source is None:
        if beyond := [*schema.tasks[1:], *schema.features_of("request")]:
            raise UserError(
                f"event_schema: {', '.join(beyond)}: requests made from events have one task, whether the item was in the group, "
                "and no features of their own: drop these, or import a log of impressions (import_impressions.source)"
            )
        return None
    about = settings.of_impressions(histories.num_buckets)
    if Table(about.path("tables", "sequences")).current() is None:
        raise UserError(f"{about.root}: no impressions yet: run `python -m jobs.import_impressions`")
    shown = SequenceTable(about.path("tables", "sequences"), about.event_schema, job="jobs.import_impressions")
    if shown.num_buckets != histories.num_buckets:
        raise UserError(
            f"{shown.version.path}: in {shown.num_buckets} buckets, the sequences in {histories.num_buckets}: run `python -m "
            "jobs.import_impressions`"
        )
    return shown


def _of_events(settings: Settings, histories: SequenceTable, splits: SplitTimes, path: str) -> dict[str, Any]:
    """Requests whose positives are a group's items."""
    schema, asked = settings.event_schema, settings.requests
    catalogue = build_catalogue(histories, splits)
    if (items := _items(settings, histories)) is not None:
        catalogue = with_features(catalogue, items, schema)
    builder = RequestBuilder(schema, splits, settings.model.windows, asked.negatives_per_positive, settings.seed, path)
    return {**write_requests(histories, builder, catalogue), "num_items": len(catalogue.items)}


def _items(settings: Settings, histories: SequenceTable) -> pa.Table | None:
    """The catalogue, if items have features: else it says nothing that the histories do not."""
    schema = settings.event_schema
    if not schema.features_of("item"):
        return None
    return read_items(settings.path("tables", "items"), histories.version.id, schema)


def _split_times(settings: Settings, first: int, last: int) -> SplitTimes:
    asked = settings.requests
    splits = split_times(first, last, asked.validation_days_share, asked.test_days_share)
    if splits is None:
        raise UserError(
            f"requests.test_days_share={asked.test_days_share}, validation_days_share={asked.validation_days_share}: no day is "
            f"left to train on in requests from {iso_time(first)} to {iso_time(last)}: lower the shares or import more days"
        )
    return splits


def _check_cut(settings: Settings, num_cut: int, num_requests: int) -> None:
    if num_cut > settings.requests.max_cut_share * num_requests:
        raise UserError(
            f"sequences.keep_events={settings.sequences.keep_events}: {num_cut} of {num_requests} requests have a history window "
            "that the sequence table cut: raise keep_events, or allow their loss with requests.max_cut_share"
        )


if __name__ == "__main__":
    run_job(__doc__, run, check=_histories)
