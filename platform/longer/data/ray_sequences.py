"""Events to sequences with Ray Data: read and trim each block, shuffle by bucket, write each bucket's rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from longer.data.sequences import KeepRule, build_sequences, trim_events
from longer.errors import UserError
from longer.progress import say, track
from longer.schema import EventSchema
from longer.storage import DataFile, Version, arrow_filesystem, checked_output

POINT_READ_COLUMNS = ["user_id", "first_index", "num_events_total"]
"""Columns with row-group statistics; those of list values would only swell the footer that a point read fetches."""


@dataclass(frozen=True)
class BucketWriter:
    """Writes the sequences of the buckets that a block of trimmed events holds; returns one row of statistics a bucket."""

    schema: EventSchema
    rule: KeepRule
    version_path: str
    row_group_users: int

    def __call__(self, events: pa.Table) -> Iterator[pa.Table]:
        for bucket in np.unique(events["bucket"].to_numpy()):
            rows = build_sequences(events.filter(pc.equal(events["bucket"], bucket)), self.schema, self.rule)
            with checked_output(self.version_path, f"bucket={bucket:04d}/part-0.parquet") as sink:
                pq.write_table(
                    rows,
                    sink,
                    compression="zstd",
                    row_group_size=self.row_group_users,
                    write_statistics=POINT_READ_COLUMNS,
                )
            times = pc.min_max(rows["event_ts"].combine_chunks().flatten().cast(pa.int64()))
            yield pa.Table.from_pylist(
                [
                    {
                        **vars(sink.data_file),
                        "num_users": len(rows),
                        "num_events": pc.sum(rows["num_events_total"]).as_py(),
                        "num_events_kept": pc.sum(pc.list_value_length(rows["event_ts"])).as_py(),
                        "first_ts": times["min"].as_py(),
                        "last_ts": times["max"].as_py(),
                    }
                ]
            )


def readable_files(events: Version, schema: EventSchema, skip_unreadable: bool) -> list[str]:
    """The event files to read. One that cannot be read, or lacks a column, raises UserError or is skipped and named."""
    readable = []
    for path in track(events.files(), len(events.files()), "check event files", "files"):
        problem = _problem(path, schema)
        if problem is None:
            readable.append(path)
        elif skip_unreadable:
            say("build_sequences", f"skipped {path}: {problem}")
        else:
            raise UserError(
                f"{path}: {problem}: restore the file, or go on without it with --sequences.skip_unreadable_files true"
            )
    if not readable:
        raise UserError(f"{events.path}: the event log is empty: import a log with at least one event")
    return readable


def write_sequences(files: list[str], num_buckets: int, schema: EventSchema, writer: BucketWriter) -> pa.Table:
    """Statistics of the buckets written, one row each; the data is under the writer's version path when this returns."""
    filesystem, _ = arrow_filesystem(files[0])
    blocks = ray.data.read_parquet(
        [arrow_filesystem(file)[1] for file in files],
        filesystem=filesystem,
        columns=schema.events_arrow().names,
        partitioning=None,
    )
    trimmed = blocks.map_batches(
        trim_events,
        fn_args=(schema, writer.rule, num_buckets),
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
    )
    written = trimmed.repartition(num_buckets, keys=["bucket"]).map_batches(
        writer, batch_format="pyarrow", batch_size=None, zero_copy_batch=True
    )
    rows = list(track(written.iter_rows(), num_buckets, "build sequences", "buckets"))
    if not rows:
        raise UserError("the event log has no events: import a log with at least one event")
    return pa.Table.from_pylist(rows)


def data_files(stats: pa.Table) -> list[DataFile]:
    return [DataFile(**row) for row in stats.select(["path", "num_bytes", "sha256"]).to_pylist()]


def _problem(path: str, schema: EventSchema) -> str | None:
    filesystem, bare = arrow_filesystem(path)
    try:
        with filesystem.open_input_file(bare) as file:
            names = pq.read_schema(file).names
    except (pa.ArrowException, OSError) as error:
        return f"not a readable Parquet file ({str(error).splitlines()[0]})"
    missing = [name for name in schema.events_arrow().names if name not in names]
    return f"no column {missing[0]!r}" if missing else None
