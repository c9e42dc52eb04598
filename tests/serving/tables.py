"""A small world on disk: sequences, requests, items and a checkpoint of random weights, built by the real kernels."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from longer.config import Settings, load_settings
from longer.data.catalogue import first_seen
from longer.data.items import items_version
from longer.data.ray_requests import RequestBuilder
from longer.data.requests import SPLITS, Catalogue, SplitTimes, merge_catalogues, partial_catalogue
from longer.data.sequences import KeepRule, events_of
from longer.data.tables import SequenceTable
from longer.model.longer import Longer
from longer.schema import EventSchema
from longer.storage import Table, Version, checked_output, fingerprint
from longer.training.checkpoints import save_weights, weights_of
from tests.data import tables

DAY_MS = 86_400_000
START_MS = 1_700_000_000_000 // DAY_MS * DAY_MS
NUM_BUCKETS = 3
NUM_USERS = 9
NUM_ITEMS = 12

SCHEMA: dict[str, Any] = {
    "user_id": "int64",
    "item_id": "string",
    "features": [
        {"name": "category", "kind": "categorical", "of": "item"},
        {"name": "price", "kind": "numeric", "of": "item"},
        {"name": "quantity", "kind": "numeric", "of": "event"},
    ],
}
OF_EVENTS = [feature["name"] for feature in SCHEMA["features"]]
MODEL = {
    "history_events": 16,
    "merge_size": 2,
    "event_width": 8,
    "query_groups": 4,
    "stride_groups": 2,
    "num_heads": 2,
    "num_self_layers": 2,
    "item_rows": 64,
    "user_rows": 64,
    "categorical_rows": 16,
}


def tiny_settings(root: Path | str, **other: object) -> Settings:
    overrides: dict[str, object] = {
        "root": str(root),
        "event_schema": SCHEMA,
        "model": MODEL,
        "sequences": {"num_buckets": NUM_BUCKETS, "keep_events": 40, "row_group_events": 20},
        **other,
    }
    return load_settings(overrides=overrides)


def random_events(schema: EventSchema, seed: int, num_days: int = 30) -> pa.Table:
    """Users 1..NUM_USERS; user u has about u*u events, several often at one time."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list] = {name: [] for name in ("user_id", "item_id", "event_ts", "action", *OF_EVENTS)}
    for user in range(1, NUM_USERS + 1):
        for ts in sorted(START_MS + rng.integers(0, num_days * 96, size=user * user) * (DAY_MS // 96)):
            item = int(rng.integers(NUM_ITEMS))
            rows["user_id"].append(user if schema.user_id == "int64" else str(user))
            rows["item_id"].append(f"item{item}")
            rows["event_ts"].append(int(ts))
            rows["action"].append("buy")
            rows["category"].append(f"category{item % 3}")
            rows["price"].append(float(item))
            rows["quantity"].append(float(rng.integers(1, 4)))
    return pa.table({field.name: pa.array(rows[field.name], field.type) for field in schema.events_arrow()})


def publish_sequences(settings: Settings, events: pa.Table) -> Version:
    version_id = fingerprint(events.num_rows, int(events["event_ts"].cast(pa.int64()).to_numpy().sum()))
    path, schema, asked = settings.path("tables", "sequences"), settings.event_schema, settings.sequences
    rule = KeepRule(asked.keep_events, settings.model.windows.stride_events)
    return tables.publish_sequences(path, events, schema, rule, NUM_BUCKETS, asked.row_group_events, version_id)


def catalogue_of(histories: SequenceTable, splits: SplitTimes) -> Catalogue:
    parts = [partial_catalogue(histories.rows(bucket), histories.schema, splits) for bucket in histories.buckets]
    return merge_catalogues(parts, histories.schema)


def publish_catalogue(settings: Settings, sequences: Version) -> Version:
    histories = SequenceTable(settings.path("tables", "sequences"), settings.event_schema, sequences.id)
    table, schema = Table(settings.path("tables", "items")), histories.schema
    events = pa.concat_tables([events_of(histories.rows(bucket), schema) for bucket in histories.buckets])
    version_id = items_version(sequences.id, schema)
    with checked_output(table.begin(version_id), "part-0.parquet") as sink:
        pq.write_table(first_seen(events, schema), sink)
    return table.publish(version_id, {"schema_hash": schema.hash()}, [sink.data_file])


def publish_requests(settings: Settings, sequences: Version) -> Version:
    """One request a user and event time, the newest days as test, with two negatives for each positive."""
    schema, windows = settings.event_schema, settings.model.windows
    splits = SplitTimes(START_MS + 15 * DAY_MS, START_MS + 20 * DAY_MS)
    histories = SequenceTable(settings.path("tables", "sequences"), schema, sequences.id)
    catalogue = catalogue_of(histories, splits)
    table = Table(settings.path("tables", "requests"))
    builder = RequestBuilder(schema, splits, windows, 2, 0, table.begin(sequences.id))
    stats = [builder(histories, bucket, catalogue) for bucket in histories.buckets]
    manifest = {
        "schema_hash": schema.hash(),
        "inputs": {"sequences": sequences.id},
        "num_buckets": NUM_BUCKETS,
        "num_requests": {split: sum(s["num_requests"][split] for s in stats) for split in SPLITS},
    }
    return table.publish(sequences.id, manifest, [file for s in stats for file in s["files"]])


def publish_random_model(settings: Settings, seed: int = 0, scale: float = 0.1) -> Version:
    """A checkpoint of weights so large that scores differ between candidates and histories."""
    return publish_model(settings, random_model(settings, seed, scale), fingerprint("random", seed, str(scale)))


def random_model(settings: Settings, seed: int, scale: float = 0.1) -> Longer:
    torch.manual_seed(seed)
    model = Longer(settings.model, settings.event_schema, settings.train.tasks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def publish_model(settings: Settings, model: Longer, version_id: str) -> Version:
    table = Table(settings.path("checkpoints"))
    path = table.begin(version_id)
    model_version = save_weights(path, weights_of(model), settings.model, settings.event_schema, settings.train.tasks)
    return table.publish(version_id, {"schema_hash": settings.event_schema.hash(), "model_version": model_version})


def checkpoint_path(settings: Settings) -> str:
    return Table(settings.path("checkpoints")).require("jobs.train").path


def build_world(root: Path | str, seed: int = 0, **other: object) -> Settings:
    """Sequences, items and checkpoint under `root`, and the settings that find them."""
    settings = tiny_settings(root, **other)
    sequences = publish_sequences(settings, random_events(settings.event_schema, seed))
    publish_catalogue(settings, sequences)
    publish_random_model(settings)
    return settings
