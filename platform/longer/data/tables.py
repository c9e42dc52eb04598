"""Readers of the sequence and request tables, pinned to one version. No Ray, no torch; local or S3."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longer.arrays import NO_EVENT_TS, Histories, offsets_of
from longer.data.batches import Requests
from longer.data.columns import histories_of, requests_of, single_array
from longer.data.layout import bucket_files, news_arrow, news_path, rows_path
from longer.data.parquet import naming, open_parquet, read_columns, read_encoded, read_row_groups
from longer.data.sequences import KeepRule, events_of, merge_sequences, older_of_news
from longer.errors import UserError
from longer.hashing import bucket_of, stable_keys
from longer.schema import EventSchema
from longer.storage import Table, Version


def open_version(path: str, schema: EventSchema, version_id: str | None, job: str) -> Version:
    """The pinned version, or the one served; a UserError if there is none or it was built with another schema."""
    version = Table(path).find(version_id) if version_id else Table(path).require(job)
    if version is None:
        raise UserError(f"{path}: version {version_id} is not in this table: run `python -m {job}` with its settings")
    if version.manifest["schema_hash"] != schema.hash():
        raise UserError(
            f"{path}: version {version.id} was built with another event_schema: "
            f"use its settings, or run `python -m {job}` with yours"
        )
    return version


@dataclass(frozen=True)
class _Footer:
    """What a point read needs of a file: where it is, its metadata, and the first and last user of each row group."""

    path: str
    num_bytes: int
    metadata: pq.FileMetaData
    first_user_G: np.ndarray
    last_user_G: np.ndarray

    def row_groups_of(self, users: pa.Array) -> list[int]:
        """The row groups that can hold these users, ascending; users ascend through the file, so each has one at most."""
        users_N = users.to_numpy(zero_copy_only=False)
        group_N = np.searchsorted(self.first_user_G, users_N, side="right") - 1
        can_hold_N = (group_N >= 0) & (users_N <= self.last_user_G[group_N])
        return np.unique(group_N[can_hold_N]).tolist()


class SequenceTable:
    """Histories by user or by bucket. Footers are read once and kept; each read opens its file, so threads may share this.

    A bucket is a file of rows, and where an increment has left them beside it, one of news: younger events of some users, which
    every read merges in (`merge_sequences`).
    """

    def __init__(
        self, path: str, schema: EventSchema, version_id: str | None = None, job: str = "jobs.build_sequences"
    ) -> None:
        """`job` is what an error tells to run."""
        self.version = open_version(path, schema, version_id, job)
        built_with = self.version.manifest["settings"]
        self.num_buckets: int = built_with["num_buckets"]
        self.rule = KeepRule(built_with["keep_events"], built_with["stride_events"])
        self.schema = schema
        self._files = {file.path: file for file in self.version.data_files()}
        self._footers: dict[str, _Footer] = {}

    def get(self, user_ids: pa.Array | Iterable[int] | Iterable[str]) -> Histories:
        """Histories of these users, in this order; a user who is not there has an empty one.

        Reads only the row groups that can hold the users.
        """
        wanted = self.ids(user_ids)
        if not len(wanted):
            return histories_of(self.schema.sequences_arrow().empty_table(), self.schema)
        found = [self._histories(bucket, users) for bucket, users in self._by_bucket(wanted)]
        ids, histories = zip(*found, strict=True)
        together = histories[0] if len(histories) == 1 else Histories.concatenate(histories)
        return _in_order(pa.concat_arrays(ids), together, wanted)

    def find(self, wanted: pa.Array) -> pa.Table:
        """The rows of those of these users (`ids`) who are there, in no stated order."""
        parts = [self._merged(bucket, users) for bucket, users in self._by_bucket(wanted)]
        return pa.concat_tables([self.schema.sequences_arrow().empty_table(), *parts]).combine_chunks()

    def _by_bucket(self, wanted: pa.Array) -> Iterator[tuple[int, pa.Array]]:
        buckets = bucket_of(stable_keys(wanted), self.num_buckets)
        return ((bucket, wanted.filter(pa.array(buckets == bucket))) for bucket in np.unique(buckets).tolist())

    def ids(self, user_ids: pa.Array | Iterable[int] | Iterable[str]) -> pa.Array:
        """The ids as the table has them; a UserError if they are of another type."""
        id_type = self.schema.id_types[0]
        given = user_ids if isinstance(user_ids, pa.Array) else pa.array(user_ids)
        is_one = pa.types.is_integer if id_type == pa.int64() else pa.types.is_string
        if len(given) and not is_one(given.type):
            raise UserError(f"user_ids: {given.type} given, the table's are {id_type}: see event_schema.user_id")
        return given.cast(id_type)

    def most_active(self, num_users: int) -> pa.Array:
        """Ids of the users with most events over all time, the most active first; what an increment added is not looked at."""
        best = pa.table(
            {"user_id": pa.array([], self.schema.id_types[0]), "num_events_total": pa.array([], pa.int64())}
        )
        for bucket in self.buckets:
            path = self.version.path_of(self._files[rows_path(bucket)])
            both = pa.concat_tables([best, read_columns(path, best.column_names).cast(best.schema)])
            best = both.take(pc.select_k_unstable(both, num_users, [("num_events_total", "descending")]))
        return single_array(best["user_id"])

    @property
    def buckets(self) -> list[int]:
        """The buckets that hold users, ascending."""
        return sorted(bucket_files(self.version))

    def rows(self, bucket: int) -> pa.Table:
        """All rows of a bucket, sorted by user."""
        return self._merged(bucket, None)

    def read_bucket(self, bucket: int) -> tuple[pa.Array, Histories]:
        """All users of a bucket, raw ids ascending, and their histories."""
        return self._histories(bucket, None)

    def _histories(self, bucket: int, users: pa.Array | None) -> tuple[pa.Array, Histories]:
        if news_path(bucket) in self._files:
            rows = self._merged(bucket, users)  # as strings
        else:
            rows = self._read(rows_path(bucket), self.schema.sequences_arrow(), users, is_encoded=True)
        return single_array(rows["user_id"]), histories_of(rows, self.schema)

    def _merged(self, bucket: int, users: pa.Array | None) -> pa.Table:
        rows = self._read(rows_path(bucket), self.schema.sequences_arrow(), users)
        if news_path(bucket) not in self._files:
            return rows
        news = self._read(news_path(bucket), news_arrow(self.schema), users)
        return merge_sequences(rows, events_of(news, self.schema), older_of_news(news), self.schema, self.rule)

    def _read(self, file: str, wanted: pa.Schema, users: pa.Array | None, is_encoded: bool = False) -> pa.Table:
        """Rows of a file, of all users or of some; none if there is no such file. Lists of strings are encoded if asked."""
        if file not in self._files:
            return wanted.empty_table()
        if users is None:
            path = self.version.path_of(self._files[file])
            return read_encoded(path, wanted.names, wanted.names) if is_encoded else read_columns(path, wanted.names)
        footer = self._footer(file)
        row_groups = footer.row_groups_of(users)
        if not row_groups:
            return wanted.empty_table()
        if is_encoded:
            table = read_row_groups(footer.path, footer.num_bytes, footer.metadata, row_groups, wanted.names)
        else:
            with naming(footer.path):
                opened = open_parquet(footer.path, footer.num_bytes, footer.metadata)
                table = opened.read_row_groups(row_groups, columns=wanted.names)
        return table.filter(pc.is_in(table["user_id"], users))

    def _footer(self, file: str) -> _Footer:
        if file not in self._footers:
            path, num_bytes = self.version.path_of(self._files[file]), self._files[file].num_bytes
            metadata = open_parquet(path, num_bytes).metadata
            spans = [metadata.row_group(group).column(0).statistics for group in range(metadata.num_row_groups)]
            id_type = object if self.schema.user_id == "string" else np.int64
            first, last = (np.array([getattr(span, end) for span in spans], id_type) for end in ("min", "max"))
            self._footers[file] = _Footer(path, num_bytes, metadata, first, last)
        return self._footers[file]


class RequestTable:
    """Requests by split and bucket."""

    def __init__(self, path: str, schema: EventSchema, version_id: str | None = None) -> None:
        self.version = open_version(path, schema, version_id, "jobs.build_requests")
        self.num_buckets: int = self.version.manifest["num_buckets"]
        self.schema = schema
        self._arrow_schema = schema.requests_arrow()
        self._file_at = {file.path: file for file in self.version.data_files()}

    def read(self, split: str, bucket: int) -> Requests:
        """All requests of a split ('train', 'valid' or 'test') in a bucket, by user and time."""
        files = self._files(split, bucket)
        names, encoded = self._arrow_schema.names, self.schema.features_of("item")
        rows = read_encoded(files[0], names, encoded) if files else self._arrow_schema.empty_table()
        return requests_of(rows, self.schema)

    def rows(self, split: str, bucket: int) -> pa.Table:
        """The same as they lie."""
        files = self._files(split, bucket)
        return read_columns(files[0]) if files else self._arrow_schema.empty_table()

    def _files(self, split: str, bucket: int) -> list[str]:
        """One or none."""
        file = self._file_at.get(f"split={split}/{rows_path(bucket)}")
        return [self.version.path_of(file)] if file else []


def histories_in_order(rows: pa.Table, wanted: pa.Array, schema: EventSchema) -> Histories:
    """The histories in `rows` (`sequences_arrow`) of the wanted users, in their order; empty for a user without a row."""
    return _in_order(single_array(rows["user_id"]), histories_of(rows, schema), wanted)


def _in_order(user_ids: pa.Array, histories: Histories, wanted: pa.Array) -> Histories:
    """The same of these users' histories."""
    row = pc.index_in(wanted, user_ids)
    known_N = row.is_valid().to_numpy(zero_copy_only=False)
    rows_N = pc.fill_null(row, 0).to_numpy(zero_copy_only=False)[known_N].astype(np.int64)
    some = histories
    if not np.array_equal(rows_N, np.arange(len(histories))):  # they are not in this order yet
        some = histories.slice_events(rows_N, histories.first_index_B[rows_N], histories.end_index_B[rows_N])
    lengths_N = np.zeros(len(known_N), np.int64)
    first_N, prev_N = lengths_N.copy(), np.full(len(known_N), NO_EVENT_TS)
    lengths_N[known_N], first_N[known_N] = np.diff(some.offsets_B1), some.first_index_B
    prev_N[known_N] = some.prev_event_ts_B
    return Histories(
        user_key_B=stable_keys(wanted),
        offsets_B1=offsets_of(lengths_N),
        first_index_B=first_N,
        prev_event_ts_B=prev_N,
        event_ts_E=some.event_ts_E,
        features=some.features,
    )
