"""Sequences to requests with Ray: one task a bucket, first for the catalogue of items, then for the requests."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from longer.data.columns import histories_of
from longer.data.layout import rows_path
from longer.data.ray_tasks import each
from longer.data.requests import (
    SPLITS,
    Catalogue,
    SplitTimes,
    draw_negatives,
    find_groups,
    is_cut,
    merge_catalogues,
    partial_catalogue,
    request_rows,
)
from longer.data.tables import SequenceTable
from longer.schema import EventSchema
from longer.storage import DataFile, checked_output
from longer.windows import WindowRule

_ROW_GROUP_REQUESTS = 4096


@dataclass(frozen=True)
class RequestBuilder:
    """Writes the requests of one bucket of sequences; without those whose window the table has cut, which it counts."""

    schema: EventSchema
    splits: SplitTimes
    windows: WindowRule
    negatives_per_positive: int
    seed: int
    version_path: str

    def __call__(self, table: SequenceTable, bucket: int, catalogue: Catalogue) -> dict[str, Any]:
        sequences = table.rows(bucket)
        histories = histories_of(sequences, self.schema)
        groups = find_groups(sequences, histories, self.schema, catalogue)
        split_R = self.splits.split_of(groups.request_ts_R)
        negatives = draw_negatives(groups, split_R, catalogue, self.negatives_per_positive, self.seed)
        rows = request_rows(groups, negatives, sequences["user_id"].combine_chunks(), self.schema, catalogue)
        cut_R = is_cut(groups, histories.first_index_B, self.windows)
        stats: dict[str, Any] = {"num_cut": int(cut_R.sum()), "files": [], "num_requests": {}, "num_candidates": {}}
        for index, split in enumerate(SPLITS):
            chosen = rows.filter(pa.array((split_R == index) & ~cut_R))
            stats["num_requests"][split] = len(chosen)
            stats["num_candidates"][split] = len(chosen["item_id"].combine_chunks().flatten())
            if len(chosen):
                with checked_output(self.version_path, f"split={split}/{rows_path(bucket)}") as sink:
                    pq.write_table(chosen, sink, compression="zstd", row_group_size=_ROW_GROUP_REQUESTS)
                stats["files"].append(sink.data_file)
        return stats


def build_catalogue(sequences: SequenceTable, splits: SplitTimes) -> Catalogue:
    """The catalogue of all items in the sequence table; the splits matter to its counts only."""
    schema = sequences.schema
    parts = each(
        lambda bucket: partial_catalogue(sequences.rows(bucket), schema, splits),
        sequences.buckets,
        len(sequences.buckets),
        "build catalogue",
        "buckets",
    )
    return merge_catalogues(parts, schema)


def write_requests(sequences: SequenceTable, builder: RequestBuilder, catalogue: Catalogue) -> dict[str, Any]:
    """Requests of all buckets, written under the builder's version path; sums of their statistics, and the files."""
    shared = ray.put(catalogue)
    buckets = sequences.buckets
    stats = each(
        lambda bucket: builder(sequences, bucket, ray.get(shared)), buckets, len(buckets), "build requests", "buckets"
    )
    total = {
        key: {split: sum(s[key][split] for s in stats) for split in SPLITS}
        for key in ("num_requests", "num_candidates")
    }
    files: list[DataFile] = [file for s in stats for file in s["files"]]
    return {**total, "num_cut": sum(s["num_cut"] for s in stats), "files": files}
