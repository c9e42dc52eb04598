"""The copy floor, Polars and DuckDB: several forms of each, since the fastest is not known before it is measured.

All write zstd level 1, which is Arrow's default. Ties in time are left to each contender, for none of them promises more.
"""

import glob
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.regroup.job import COLUMNS, LISTS, Contender, Job

_SHARE_OF_LIMIT = 0.75  # for what a library counts itself; the rest is for what it does not


_OUR_ENCODINGS = {
    "use_dictionary": ["action"],
    "column_encoding": {"event_ts": "DELTA_BINARY_PACKED", "item_id": "DELTA_BINARY_PACKED"},
    "write_statistics": ["user_id"],
}


def _copy_floor(num_threads: int, **encodings: Any) -> Contender:
    """Reads the log with Arrow and writes it back, some files at a time: what no regrouping can beat."""

    def prepare(job: Job) -> Callable[[], list[str]]:
        import pyarrow.parquet as pq

        def copy(number: int, file: str) -> None:
            log = pq.read_table(file, partitioning=None)
            pq.write_table(log, f"{job.out}/{number}.parquet", compression="zstd", **encodings)

        def work() -> list[str]:
            with ThreadPoolExecutor(num_threads) as pool:
                for _ in pool.map(copy, *zip(*enumerate(sorted(glob.glob(job.log_files))), strict=True)):
                    pass  # raises what a copy has raised
            return job.written()

        return work

    return prepare


def _polars(write: Callable[[Any, Job], None]) -> Contender:
    """A form of Polars from what it does with the module; its spilling and its idea of the machine follow the limit."""

    def prepare(job: Job) -> Callable[[], list[str]]:
        os.environ["POLARS_MAX_THREADS"] = str(job.num_cores)
        os.environ["POLARS_OOC_SPILL_DIR"] = job.scratch
        if job.memory_bytes:
            os.environ["POLARS_OVERRIDE_TOTAL_MEMORY_MB"] = str(job.memory_bytes >> 20)
            os.environ["POLARS_OOC_MEMORY_BUDGET_MB"] = str(int(job.memory_bytes * _SHARE_OF_LIMIT) >> 20)
        import polars

        def work() -> list[str]:
            write(polars, job)
            return job.written()

        return work

    return prepare


def _scan(pl: Any, files: str) -> Any:
    return pl.scan_parquet(files, hive_partitioning=False).select(COLUMNS)


def _sink(frame: Any, file: str) -> None:
    frame.sink_parquet(file, compression="zstd", compression_level=1, engine="streaming")


def _polars_sort_by(pl: Any, job: Job) -> None:
    frame = _scan(pl, job.log_files).group_by("user_id").agg(pl.col(LISTS).sort_by("event_ts"))
    _sink(frame, f"{job.out}/all.parquet")


def _polars_arg_sort(pl: Any, job: Job) -> None:
    _sink(_arg_sorted(pl, _scan(pl, job.log_files)), f"{job.out}/all.parquet")


def _polars_sort_first(pl: Any, job: Job) -> None:
    by_time = _scan(pl, job.log_files).with_columns(pl.col("action").cast(pl.Categorical)).sort("event_ts")
    lists = by_time.group_by("user_id", maintain_order=True).agg(pl.col(LISTS))
    _sink(lists.with_columns(pl.col("action").cast(pl.List(pl.String))), f"{job.out}/all.parquet")


def _polars_partitioned(pl: Any, job: Job) -> None:
    """Two passes: events by hash of user to disk, then each part on its own."""
    parts = f"{job.scratch}/parts"
    hashed = _scan(pl, job.log_files).with_columns(part=pl.col("user_id").hash() % job.num_partitions)
    hashed.sink_parquet(pl.PartitionBy(parts, key="part", include_key=False), compression="lz4", mkdir=True)
    for number, part in enumerate(sorted(glob.glob(f"{parts}/part=*"))):
        _sink(_arg_sorted(pl, _scan(pl, f"{part}/*.parquet")), f"{job.out}/{number}.parquet")


def _arg_sorted(pl: Any, events: Any) -> Any:
    """Lists in the order of arrival, then one order a user, applied to every list."""
    lists = events.with_columns(pl.col("action").cast(pl.Categorical)).group_by("user_id").agg(pl.col(LISTS))
    order = pl.col("event_ts").list.eval(pl.element().arg_sort())
    sorted_lists = lists.with_columns(order=order).with_columns(pl.col(name).list.gather("order") for name in LISTS)
    return sorted_lists.drop("order").with_columns(pl.col("action").cast(pl.List(pl.String)))


def _duckdb(write: Callable[[Any, Job], None]) -> Contender:
    """A form of DuckDB from what it does with a connection."""

    def prepare(job: Job) -> Callable[[], list[str]]:
        import duckdb

        connection = duckdb.connect()
        connection.execute(f"SET threads = {job.num_cores}")
        connection.execute("SET preserve_insertion_order = false")
        connection.execute(f"SET temp_directory = '{job.scratch}/duckdb'")
        if job.memory_bytes:
            connection.execute(f"SET memory_limit = '{int(job.memory_bytes * _SHARE_OF_LIMIT)}B'")

        def work() -> list[str]:
            write(connection, job)
            return job.written()

        return work

    return prepare


def _events(files: str) -> str:
    return f"(SELECT {', '.join(COLUMNS)} FROM read_parquet('{files}', hive_partitioning = false))"


def _copy(connection: Any, query: str, file: str) -> None:
    connection.execute(f"COPY ({query}) TO '{file}' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)")


def _duckdb_list_order_by(connection: Any, job: Job) -> None:
    lists = ", ".join(f"list({name} ORDER BY event_ts) AS {name}" for name in LISTS)
    _copy(
        connection, f"SELECT user_id, {lists} FROM {_events(job.log_files)} GROUP BY user_id", f"{job.out}/all.parquet"
    )


def _duckdb_sort_first(connection: Any, job: Job) -> None:
    """Often written, and with more than one thread not in order: the groups of the threads are joined as they come."""
    lists = ", ".join(f"list({name}) AS {name}" for name in LISTS)
    by_time = f"(FROM {_events(job.log_files)} ORDER BY user_id, event_ts)"
    _copy(connection, f"SELECT user_id, {lists} FROM {by_time} GROUP BY user_id", f"{job.out}/all.parquet")


def _duckdb_struct_sort(connection: Any, job: Job) -> None:
    _create_label(connection, job)
    _copy(connection, _sorted_structs(job.log_files), f"{job.out}/all.parquet")


def _duckdb_partitioned(connection: Any, job: Job) -> None:
    """Two passes: events by hash of user to disk, then each part on its own."""
    _create_label(connection, job)
    parts = f"{job.scratch}/parts"
    hashed = f"SELECT *, hash(user_id) % {job.num_partitions} AS part FROM {_events(job.log_files)}"
    connection.execute(f"COPY ({hashed}) TO '{parts}' (FORMAT parquet, PARTITION_BY (part), COMPRESSION lz4)")
    for number, part in enumerate(sorted(glob.glob(f"{parts}/part=*"))):
        _copy(connection, _sorted_structs(f"{part}/*.parquet"), f"{job.out}/{number}.parquet")


def _create_label(connection: Any, job: Job) -> None:
    """Labels sort and move faster as an enum; finding its values is part of the time."""
    connection.execute(f"CREATE TYPE label AS ENUM (SELECT DISTINCT action FROM {_events(job.log_files)})")


def _sorted_structs(files: str) -> str:
    """One list of structs a user, sorted, then taken apart."""
    lists = ", ".join(
        f"list_transform(events, lambda e: e.{key}){kind} AS {name}"
        for key, name, kind in (("i", "item_id", ""), ("t", "event_ts", ""), ("a", "action", "::VARCHAR[]"))
    )
    structs = "list_sort(list({'t': event_ts, 'i': item_id, 'a': action::label}))"
    return f"SELECT user_id, {lists} FROM (SELECT user_id, {structs} AS events FROM {_events(files)} GROUP BY user_id)"


FORMS: dict[str, Contender] = {
    "copy floor: one file at a time": _copy_floor(1),
    "copy floor: two files at a time": _copy_floor(2),
    "copy floor: the same, encoded as our tables are": _copy_floor(2, **_OUR_ENCODINGS),
    "polars: group_by, sort_by": _polars(_polars_sort_by),
    "polars: group_by, arg_sort of lists": _polars(_polars_arg_sort),
    "polars: sort by time, group_by": _polars(_polars_sort_first),
    "polars: two passes by hash": _polars(_polars_partitioned),
    "duckdb: list(... order by)": _duckdb(_duckdb_list_order_by),
    "duckdb: sort, then list": _duckdb(_duckdb_sort_first),
    "duckdb: list_sort of structs": _duckdb(_duckdb_struct_sort),
    "duckdb: two passes by hash": _duckdb(_duckdb_partitioned),
}
