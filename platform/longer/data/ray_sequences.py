"""Events to sequences on Ray, in two passes: cut the log by bucket, block by block; then build each bucket on its own.

Each block and bucket leaves a record beside its data, so a job that was killed goes on where it was, and the most that any
process holds is one block or one bucket. Measured against Ray Data's shuffles in `benchmarks.sequences`.

K blocks, P buckets, U users of a bucket, E events of its news.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longer.arrays import Int64
from longer.data.build_plan import BuildPlan
from longer.data.columns import flat_list
from longer.data.layout import BucketFiles, news_arrow, news_path, rows_path
from longer.data.parquet import read_columns
from longer.data.ray_tasks import each
from longer.data.records import SCRATCH, Record, finished, remember, scratch
from longer.data.segments import (
    Piece,
    look_at,
    look_inside,
    plan_blocks,
    read_block,
    read_segments,
    write_segments,
)
from longer.data.sequences import (
    Older,
    build_sequences,
    events_of,
    merge_sequences,
    news_rows,
    older_of_news,
    place_news,
    plain,
    totals_with,
    trim_events,
)
from longer.errors import UserError
from longer.hashing import stable_keys
from longer.progress import say, track
from longer.schema import EventSchema
from longer.storage import DataFile, checked_output
from longer.table_settings import ImportSettings

POINT_READ_COLUMNS = ["user_id", "first_index", "num_events_total"]
"""Columns with row-group statistics; those of list values would only swell the footer that a point read fetches."""

_NUM_FOOTER_THREADS = 32


@dataclass(frozen=True)
class Build:
    """The two passes of a plan, into the folder of its version."""

    plan: BuildPlan
    schema: EventSchema
    version_path: str

    @property
    def scratch(self) -> str:
        return scratch(self.version_path)

    def cut_block(self, block: tuple[int, list[Piece]]) -> Record:
        """Writes a block's segments; what they hold."""
        number, pieces = block
        log, not_before_ms = read_block(pieces, self.schema), self.plan.not_before_ms
        events = log if not_before_ms is None else _not_before(log, not_before_ms)
        starts = write_segments(
            self._block_path(number), events, self.schema, self.plan.settings["num_buckets"], self.plan.rule
        )
        times = pc.min_max(events["event_ts"].cast(pa.int64()))
        record = {
            "starts": starts,
            "num_events": len(events),
            "num_too_late": len(log) - len(events),
            "first_ts": times["min"].as_py(),
            "last_ts": times["max"].as_py(),
        }
        return self._remember(f"block-{number:05d}", record)

    def build_bucket(self, bucket: tuple[int, Int64]) -> Record:
        """Writes a bucket's rows, or beside those of the last version its news; what it then holds.

        `bucket` is its number, and from where to where its segment lies in each block's file, [blocks, 2].
        """
        number, spans_K2 = bucket
        segments = [(self._block_path(block), start, end) for block, (start, end) in enumerate(spans_K2.tolist())]
        events, older = read_segments(segments, self.schema, self.plan.rule)
        if number in self.plan.base_files:
            return self._add_news(number, self.plan.base_files[number], plain(events), older)
        rows = build_sequences(events, older, self.schema, self.plan.rule)
        files = [self._write_lists(rows, rows_path(number))]
        return self._record(number, files, rows["num_events_total"].to_numpy(), num_too_late=0)

    def _add_news(self, number: int, base: BucketFiles, events: pa.Table, older: Older) -> Record:
        """Of an increment: all news since the bucket's rows were written, or rows written anew if those are many."""
        assert self.plan.base
        path, schema, rule = self.plan.base.path_of(base.rows), self.schema, self.plan.rule
        kept = read_columns(path, ["user_id", "first_index", "prev_event_ts", "num_events_total"])
        earlier = read_columns(self.plan.base.path_of(base.news)) if base.news else news_arrow(schema).empty_table()
        events, older, num_too_late = place_news(
            pa.concat_tables([events_of(earlier, schema), events]).combine_chunks(),
            Older.concatenate([older_of_news(earlier), older]),
            kept,
            rule,
        )
        younger_E, cut = trim_events(events, stable_keys(events["user_id"]), schema, rule)
        if younger_E is not None:
            events, older = events.take(pa.array(younger_E)), Older.concatenate([older, cut])
        total_U = totals_with(kept, events, older)
        num_kept = pc.sum(kept["num_events_total"]).as_py() - pc.sum(kept["first_index"]).as_py()
        if len(events) > self.plan.inputs["merge_share"] * num_kept:
            rows = merge_sequences(read_columns(path), events, older, schema, rule)
            files = [self._write_lists(rows, rows_path(number))]
        elif len(events):
            files = [base.rows, self._write_lists(news_rows(events, older, schema), news_path(number))]
        else:
            files = [base.rows]  # all came too late
        return self._record(number, files, total_U, num_too_late)

    def _block_path(self, number: int) -> str:
        return f"{self.scratch}/block-{number:05d}.arrow"

    def _write_lists(self, rows: pa.Table, file: str) -> DataFile:
        """Row groups of about as many events each, so that a point read costs the same whether histories are short or long."""
        starts_U = flat_list(rows["event_ts"])[0][:-1]
        bounds = np.flatnonzero(np.diff(starts_U // self.plan.settings["row_group_events"], prepend=-1, append=-2))
        fields = self.schema.event_fields()
        strings = [f.name for f in fields if pa.types.is_string(f.type)]
        integers = [f.name for f in fields if pa.types.is_integer(f.type) or pa.types.is_timestamp(f.type)]
        with (
            checked_output(self.version_path, file) as sink,
            pq.ParquetWriter(
                sink,
                rows.schema,
                compression="zstd",
                write_statistics=POINT_READ_COLUMNS,
                use_dictionary=[f"{name}.list.element" for name in strings],
                column_encoding={f"{name}.list.element": "DELTA_BINARY_PACKED" for name in integers},
                store_schema=False,  # coded strings are read as what they are
            ) as writer,
        ):
            for begin, end in pairwise(bounds):
                writer.write_table(rows.slice(begin, end - begin), row_group_size=len(rows))
        return sink.data_file

    def _record(self, number: int, files: list[DataFile], total_U: Int64, num_too_late: int) -> Record:
        """What a bucket holds, with its files and the totals of its users."""
        kept_U = total_U - self.plan.rule.first_index(total_U)
        counts = {"num_users": len(total_U), "num_events": int(total_U.sum()), "num_events_kept": int(kept_U.sum())}
        record = {"bucket": number, **counts, "num_too_late": num_too_late, "files": [vars(file) for file in files]}
        return self._remember(f"bucket-{number:04d}", record)

    def _remember(self, name: str, record: Record) -> Record:
        return remember(self.version_path, name, record)


def readable_files(
    files: list[str], schema: EventSchema, skip_unreadable: bool, about: type[ImportSettings] = ImportSettings
) -> dict[str, list[int]]:
    """The imported files to read and the rows of their row groups.

    One that cannot be read, or lacks a column, raises UserError or is skipped and named. Which are skipped must be known before
    anything is built, so then each is read to its end, in tasks.
    """
    if skip_unreadable:
        looked = each(lambda file: look_inside(file, schema), files, len(files), f"read files of {about.rows}", "files")
    else:
        with ThreadPoolExecutor(_NUM_FOOTER_THREADS) as pool:
            footers = pool.map(lambda file: look_at(file, schema), files)
            looked = list(track(footers, len(files), f"check files of {about.rows}", "files"))
    readable = {}
    for file, rows in zip(files, looked, strict=True):
        if isinstance(rows, list):
            readable[file] = rows
        elif skip_unreadable:
            say(about.sequences_job, f"skipped {file}: {rows}")
        else:
            raise UserError(f"{file}: {rows}: restore the file, or leave it out with --sequences.skip_unreadable_files")
    return readable


def write_sequences(build: Build, files: dict[str, list[int]], rows: str) -> tuple[list[Record], list[Record]]:
    """Records of the blocks read, and of the buckets written, which are those that get events of the files.

    `files` gives the rows of each file's row groups, `rows` what they are, events or impressions.
    What an interrupted run of the same build has finished is not done again.
    """
    done = finished(build.version_path, _files_of)
    plan = plan_blocks(files)
    if not plan:
        return [], []
    blocks = _resume(
        build.cut_block, "block-{:05d}", range(len(plan)), lambda n: (n, plan[n]), done, f"cut {rows} by bucket"
    )
    starts_KP1 = np.array([block.pop("starts") for block in blocks], np.int64).reshape(len(blocks), -1)
    num_bytes_P = np.diff(starts_KP1).sum(axis=0)
    largest_first = np.argsort(-num_bytes_P, kind="stable")  # so that none is waited for at the end
    filled = largest_first[num_bytes_P[largest_first] > 0].tolist()
    buckets = _resume(
        build.build_bucket,
        "bucket-{:04d}",
        filled,
        lambda bucket: (bucket, starts_KP1[:, bucket : bucket + 2]),
        done,
        f"build sequences of {rows}",
    )
    return blocks, buckets


def _resume(
    function: Callable[[Any], Record],
    name: str,
    numbers: Sequence[int],
    argument: Callable[[int], Any],
    done: dict[str, Record],
    stage: str,
) -> list[Record]:
    """Records of all the numbers: those that are done already, and those of tasks for the rest."""
    missing = [number for number in numbers if name.format(number) not in done]
    unit = f"{name.partition('-')[0]}s"
    fresh = each(function, map(argument, missing), len(missing), stage, unit)
    both = done | {name.format(number): record for number, record in zip(missing, fresh, strict=True)}
    return [both[name.format(number)] for number in numbers]


def _files_of(name: str, record: Record) -> dict[str, int]:
    """What a block's or a bucket's task has written, with sizes; files of the base are not its own."""
    if "starts" in record:
        return {f"{SCRATCH}/{name}.arrow": record["starts"][-1]}
    return {file["path"]: file["num_bytes"] for file in record["files"] if not file["version"]}


def _not_before(events: pa.Table, time_ms: int) -> pa.Table:
    return events.filter(pc.greater_equal(events["event_ts"].cast(pa.int64()), time_ms)).combine_chunks()
