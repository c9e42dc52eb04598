"""The test split's requests alone: of long histories, `jobs.build_requests` writes a hundred times as many to train on."""

from dataclasses import replace
from datetime import datetime

import numpy as np
import pyarrow.parquet as pq

from longer.config import Settings
from longer.data.columns import histories_of, single_array
from longer.data.items import read_items
from longer.data.layout import rows_path
from longer.data.ray_requests import build_catalogue
from longer.data.ray_tasks import each
from longer.data.requests import (
    SPLITS,
    Catalogue,
    Groups,
    SplitTimes,
    draw_negatives,
    find_groups,
    is_cut,
    request_rows,
    split_times,
    with_features,
)
from longer.data.tables import SequenceTable
from longer.storage import DataFile, Table, checked_output, fingerprint

_ROW_GROUP_REQUESTS = 4096


def build_newest_requests(settings: Settings) -> None:
    """Publishes a request table, rows as `jobs.build_requests` makes them, if there is none yet."""
    schema, asked = settings.event_schema, settings.requests
    sequences = SequenceTable(settings.path("tables", "sequences"), schema)
    table = Table(settings.path("tables", "requests"))
    chosen = {**asked.model_dump(mode="json"), "windows": vars(settings.model.windows), "seed": settings.seed}
    version_id = fingerprint("newest requests", sequences.version.id, chosen)
    if table.reuse(version_id):
        return
    manifest = sequences.version.manifest
    first, last = (
        int(datetime.fromisoformat(manifest[name]).timestamp() * 1000) for name in ("first_event_ts", "watermark")
    )
    splits = split_times(first, last, asked.validation_days_share, asked.test_days_share)
    assert splits, "the benchmark's log has days enough"
    items = read_items(settings.path("tables", "items"), sequences.version.id, schema)
    catalogue = with_features(build_catalogue(sequences, splits), items, schema)
    path = table.begin(version_id)
    buckets = sequences.buckets
    written = each(
        lambda bucket: _write(settings, sequences, bucket, catalogue, splits, path),
        buckets,
        len(buckets),
        "build test requests",
        "buckets",
    )
    about = {
        "schema_hash": schema.hash(),
        "inputs": {"sequences": sequences.version.id},
        "num_buckets": sequences.num_buckets,
        "num_requests": {**dict.fromkeys(SPLITS, 0), "test": sum(num for _, num in written)},
    }
    table.publish(version_id, about, [file for file, _ in written])


def _write(
    settings: Settings, sequences: SequenceTable, bucket: int, catalogue: Catalogue, splits: SplitTimes, path: str
) -> tuple[DataFile, int]:
    schema = settings.event_schema
    rows = sequences.rows(bucket)
    histories = histories_of(rows, schema)
    groups = find_groups(rows, histories, schema, catalogue)
    first_index_R = histories.first_index_B[groups.user_row_R]
    cut_R = is_cut(groups.history_end_R, first_index_R, settings.model.windows)
    groups = _some(groups, (groups.request_ts_R >= splits.test_from_ms) & ~cut_R)
    split_R = np.full(len(groups.request_id_R), SPLITS.index("test"), np.int8)
    negatives = draw_negatives(groups, split_R, catalogue, settings.requests.negatives_per_positive, settings.seed)
    requests = request_rows(groups, negatives, single_array(rows["user_id"]), schema, catalogue)
    with checked_output(path, f"split=test/{rows_path(bucket)}") as sink:
        pq.write_table(requests, sink, compression="zstd", row_group_size=_ROW_GROUP_REQUESTS)
    return sink.data_file, len(requests)


def _some(groups: Groups, chosen_R: np.ndarray) -> Groups:
    """The chosen requests."""
    sizes_R = np.diff(groups.item_offsets_R1)
    return replace(
        groups,
        user_row_R=groups.user_row_R[chosen_R],
        request_id_R=groups.request_id_R[chosen_R],
        request_ts_R=groups.request_ts_R[chosen_R],
        history_end_R=groups.history_end_R[chosen_R],
        item_offsets_R1=np.append(0, np.cumsum(sizes_R[chosen_R])),
        item_row_P=groups.item_row_P[np.repeat(chosen_R, sizes_R)],
    )
