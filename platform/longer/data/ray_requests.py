"""Sequences to requests with Ray: one task a bucket, first for the catalogue of items, then for the requests."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from longer.data.columns import histories_of, read_columns
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
from longer.schema import EventSchema
from longer.storage import DataFile, Version, checked_output
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

    def __call__(self, file: str, catalogue: Catalogue) -> dict[str, Any]:
        sequences = read_columns(file)
        histories = histories_of(sequences, self.schema)
        groups = find_groups(sequences, histories, self.schema, catalogue)
        split_R = self.splits.split_of(groups.request_ts_R)
        negatives = draw_negatives(groups, split_R, catalogue, self.negatives_per_positive, self.seed)
        rows = request_rows(groups, negatives, sequences["user_id"].combine_chunks(), self.schema, catalogue)
        cut_R = is_cut(groups, histories.first_index_B, self.windows)
        stats: dict[str, Any] = {"num_cut": int(cut_R.sum()), "files": [], "num_requests": {}, "num_candidates": {}}
        bucket = file.rsplit("/", 2)[1]
        for index, split in enumerate(SPLITS):
            chosen = rows.filter(pa.array((split_R == index) & ~cut_R))
            stats["num_requests"][split] = len(chosen)
            stats["num_candidates"][split] = len(chosen["item_id"].combine_chunks().flatten())
            if len(chosen):
                with checked_output(self.version_path, f"split={split}/{bucket}/part-0.parquet") as sink:
                    pq.write_table(chosen, sink, compression="zstd", row_group_size=_ROW_GROUP_REQUESTS)
                stats["files"].append(sink.data_file)
        return stats


def build_catalogue(sequences: Version, schema: EventSchema, splits: SplitTimes) -> Catalogue:
    """The catalogue of all items in the sequence table."""

    def partial(file: str) -> pa.Table:
        names = ["event_ts", "item_id", *schema.features_of("item")]
        return partial_catalogue(read_columns(file, names), schema, splits)

    return merge_catalogues(each(partial, sequences.files(), "build catalogue", "buckets"), schema)


def write_requests(sequences: Version, builder: RequestBuilder, catalogue: Catalogue) -> dict[str, Any]:
    """Requests of all buckets, written under the builder's version path; sums of their statistics, and the files."""
    shared = ray.put(catalogue)
    stats = each(lambda file: builder(file, ray.get(shared)), sequences.files(), "build requests", "buckets")
    total = {
        key: {split: sum(s[key][split] for s in stats) for split in SPLITS}
        for key in ("num_requests", "num_candidates")
    }
    files: list[DataFile] = [file for s in stats for file in s["files"]]
    return {**total, "num_cut": sum(s["num_cut"] for s in stats), "files": files}
