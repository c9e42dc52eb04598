"""Events to sequences with Ray Data: read and trim each block, shuffle by bucket, write each bucket's rows."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from longer.data.sequences import KeepRule, build_sequences, trim_events
from longer.errors import UserError, one_line
from longer.progress import say, track
from longer.schema import EventSchema
from longer.storage import DataFile, Version, arrow_filesystem, checked_output

POINT_READ_COLUMNS = ["user_id", "first_index", "num_events_total"]
"""Columns with row-group statistics; those of list values would only swell the footer that a point read fetches."""

_NUM_FOOTER_THREADS = 32
_BLOCK_BYTES_ON_DISK = 16 << 20  # about 128 MiB in memory


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


@dataclass(frozen=True)
class EventReader:
    """Reads a row of event files and trims their events: each file is opened once, and an error names it."""

    schema: EventSchema
    rule: KeepRule
    num_buckets: int

    def __call__(self, blocks: pa.Table) -> pa.Table:
        files = blocks["files"].combine_chunks().flatten().to_pylist()
        events = pa.concat_tables([self._read(file) for file in files])
        return trim_events(events, self.schema, self.rule, self.num_buckets)

    def _read(self, path: str) -> pa.Table:
        filesystem, bare = arrow_filesystem(path)
        wanted = self.schema.events_arrow()
        try:
            return pq.read_table(bare, filesystem=filesystem, columns=wanted.names, partitioning=None).cast(wanted)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: damaged inside ({one_line(error)}): restore the file or import the log again"
            ) from None


def readable_files(events: Version, schema: EventSchema, skip_unreadable: bool) -> list[str]:
    """The event files to read. One that cannot be opened, or lacks a column, raises UserError or is skipped and named."""
    files = events.files()
    with ThreadPoolExecutor(_NUM_FOOTER_THREADS) as pool:
        problems = pool.map(lambda file: _problem(file, schema, inside=skip_unreadable), files)
        readable = []
        for file, problem in zip(files, track(problems, len(files), "check event files", "files"), strict=True):
            if problem is None:
                readable.append(file)
            elif skip_unreadable:
                say("build_sequences", f"skipped {file}: {problem}")
            else:
                raise UserError(
                    f"{file}: {problem}: restore the file, or leave it out with --sequences.skip_unreadable_files"
                )
    if not readable:
        raise UserError(f"{events.path}: the event log is empty: import a log with at least one event")
    return readable


def write_sequences(events: Version, files: list[str], reader: EventReader, writer: BucketWriter) -> pa.Table:
    """Statistics of the buckets written, one row each; the data is under the writer's version path when this returns."""
    num_bytes = events.manifest["num_bytes"]
    blocks = np.array_split(np.array(files, object), _num_blocks(num_bytes, len(files)))
    read = ray.data.from_items(
        [{"files": list(block)} for block in blocks], override_num_blocks=len(blocks)
    ).map_batches(reader, batch_format="pyarrow", batch_size=None)
    shuffled = read.repartition(_num_blocks(num_bytes, reader.num_buckets), keys=["bucket"])
    written = shuffled.map_batches(writer, batch_format="pyarrow", batch_size=None)
    return pa.Table.from_pylist(list(track(written.iter_rows(), reader.num_buckets, "build sequences", "buckets")))


def _num_blocks(num_bytes: int, most: int) -> int:
    """Blocks large enough to be worth a task and a worker process, which takes a second to start; one a CPU at least."""
    num_cpus = int(ray.cluster_resources()["CPU"])
    return min(most, max(num_cpus, num_bytes // _BLOCK_BYTES_ON_DISK))


def data_files(stats: pa.Table) -> list[DataFile]:
    return [DataFile(**row) for row in stats.select(["path", "num_bytes", "sha256"]).to_pylist()]


def _problem(path: str, schema: EventSchema, inside: bool) -> str | None:
    """Why a file cannot be used, if so. Damage inside is looked for too where it must be known which files are skipped."""
    filesystem, bare = arrow_filesystem(path)
    try:
        with filesystem.open_input_file(bare) as file:
            names = pq.read_schema(file).names
            if inside:
                pq.ParquetFile(file).read()
    except (pa.ArrowException, OSError) as error:
        return f"not a readable Parquet file ({one_line(error)})"
    missing = [name for name in schema.events_arrow().names if name not in names]
    return f"no column {missing[0]!r}" if missing else None
