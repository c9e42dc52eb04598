"""Requests with Ray, one task a bucket: of sequences, after a pass for the catalogue of items, or of impressions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from longer.data.columns import cut_lists, histories_of, milliseconds, single_array
from longer.data.impressions import requests_shown
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
from longer.storage import CheckedOutput, DataFile, checked_output
from longer.windows import WindowRule

_ROW_GROUP_REQUESTS = 4096
_ROW_GROUP_CANDIDATES = 1 << 20
"""Of all of its requests, or of one that has more."""


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
        cut_R = is_cut(groups.history_end_R, histories.first_index_B[groups.user_row_R], self.windows)
        return _written(rows, split_R, cut_R, bucket, self.version_path)


@dataclass(frozen=True)
class ImpressionBuilder:
    """The same of one bucket of impressions, which the sequence table `shown` holds in the buckets of `histories`.

    Requests after `until_ms`, the newest event's time, are left for the build that has the events before them, and counted.
    """

    histories: SequenceTable
    shown: SequenceTable
    group_id: str | None
    splits: SplitTimes
    windows: WindowRule
    until_ms: int
    version_path: str

    def __call__(self, bucket: int, items: pa.Table | None) -> dict[str, Any]:
        users, histories = self.histories.read_bucket(bucket)
        schema = self.histories.schema
        requests = requests_shown(self.shown.rows(bucket), users, histories, items, schema, self.group_id)
        time_R, end_R = milliseconds(single_array(requests.rows["request_ts"])), requests.rows["history_end"].to_numpy()
        later_R = time_R > self.until_ms
        cut_R = is_cut(end_R, requests.first_index_R, self.windows) & ~later_R
        rows = requests.rows.filter(pa.array(~later_R))
        stats = _written(rows, self.splits.split_of(time_R[~later_R]), cut_R[~later_R], bucket, self.version_path)
        return {**stats, "num_later": int(later_R.sum())}


def _written(
    rows: pa.Table, split_R: npt.NDArray[np.int8], cut_R: npt.NDArray[np.bool_], bucket: int, version_path: str
) -> dict[str, Any]:
    stats: dict[str, Any] = {"num_cut": int(cut_R.sum()), "files": [], "num_requests": {}, "num_candidates": {}}
    for index, split in enumerate(SPLITS):
        chosen = rows.filter(pa.array((split_R == index) & ~cut_R))
        stats["num_requests"][split] = len(chosen)
        stats["num_candidates"][split] = len(chosen["item_id"].combine_chunks().flatten())
        if len(chosen):
            with checked_output(version_path, f"split={split}/{rows_path(bucket)}") as sink:
                _write_rows(chosen, sink)
            stats["files"].append(sink.data_file)
    return stats


def _write_rows(rows: pa.Table, sink: CheckedOutput) -> None:
    """In row groups that are small also where some requests have very many candidates: whoever reads holds one of them."""
    with pq.ParquetWriter(sink, rows.schema, compression="zstd") as writer:
        for begin, end in cut_lists(rows["item_id"], _ROW_GROUP_REQUESTS, _ROW_GROUP_CANDIDATES):
            writer.write_table(rows.slice(begin, end - begin))


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
    return _write(lambda bucket: builder(sequences, bucket, ray.get(shared)), sequences.buckets)


def write_shown(builder: ImpressionBuilder, items: pa.Table | None) -> dict[str, Any]:
    """The same of impressions; `items` is the catalogue, if items have features."""
    shared = ray.put(items)
    return _write(lambda bucket: builder(bucket, ray.get(shared)), builder.shown.buckets)


def _write(build: Callable[[int], dict[str, Any]], buckets: Sequence[int]) -> dict[str, Any]:
    stats = each(build, buckets, len(buckets), "build requests", "buckets")
    by_split = {
        key: {split: sum(s[key][split] for s in stats) for split in SPLITS}
        for key in ("num_requests", "num_candidates")
    }
    counts = {key: sum(s[key] for s in stats) for key in ("num_cut", "num_later") if key in stats[0]}
    files: list[DataFile] = [file for s in stats for file in s["files"]]
    return {**by_split, **counts, "files": files}
