"""Readers of the sequence and request tables, pinned to one version. No Ray, no torch; local or S3."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longer.arrays import NO_EVENT_TS, Histories
from longer.data.batches import Requests
from longer.data.columns import histories_of, naming, open_parquet, read_columns, requests_of, single_array
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
    """Histories by user or by bucket. Footers are read once and kept; each read opens its file, so threads may share this."""

    def __init__(self, path: str, schema: EventSchema, version_id: str | None = None) -> None:
        self.version = open_version(path, schema, version_id, "jobs.build_sequences")
        self.num_buckets: int = self.version.manifest["settings"]["num_buckets"]
        self.schema = schema
        self._arrow_schema = schema.sequences_arrow()
        self._footers: dict[int, _Footer | None] = {}

    def get(self, user_ids: pa.Array | Iterable[int] | Iterable[str]) -> Histories:
        """Histories of these users, in this order; a user who is not there has an empty one.

        Reads only the row groups that can hold the users.
        """
        wanted = user_ids if isinstance(user_ids, pa.Array) else pa.array(user_ids, self.schema.id_types[0])
        buckets = bucket_of(stable_keys(wanted), self.num_buckets)
        parts = [
            self._read_users(int(bucket), wanted.filter(pa.array(buckets == bucket))) for bucket in np.unique(buckets)
        ]
        users, histories = zip(*(parts or [self._rows(self._empty())]), strict=True)
        row = pc.index_in(wanted, pa.concat_arrays(users))
        return _rows_or_empty(Histories.concatenate(histories), row, stable_keys(wanted))

    def read_bucket(self, bucket: int) -> tuple[pa.Array, Histories]:
        """All users of a bucket, raw ids ascending, and their histories."""
        files = self.version.files(f"bucket={bucket:04d}/")
        return self._rows(read_columns(files[0], self._arrow_schema.names) if files else self._empty())

    def _read_users(self, bucket: int, users: pa.Array) -> tuple[pa.Array, Histories]:
        footer = self._footer(bucket)
        row_groups = footer.row_groups_of(users) if footer else []
        if footer is None or not row_groups:
            return self._rows(self._empty())
        with naming(footer.path):
            file = open_parquet(footer.path, footer.num_bytes, footer.metadata)
            table = file.read_row_groups(row_groups, columns=self._arrow_schema.names)
        return self._rows(table.filter(pc.is_in(table["user_id"], users)))

    def _rows(self, table: pa.Table) -> tuple[pa.Array, Histories]:
        return single_array(table["user_id"]), histories_of(table, self.schema)

    def _footer(self, bucket: int) -> _Footer | None:
        if bucket not in self._footers:
            prefix = f"bucket={bucket:04d}/"
            sizes = [file.num_bytes for file in self.version.data_files() if file.path.startswith(prefix)]
            found = list(zip(self.version.files(prefix), sizes, strict=True))
            self._footers[bucket] = self._read_footer(*found[0]) if found else None
        return self._footers[bucket]

    def _read_footer(self, path: str, num_bytes: int) -> _Footer:
        metadata = open_parquet(path, num_bytes).metadata
        spans = [metadata.row_group(group).column(0).statistics for group in range(metadata.num_row_groups)]
        id_type = object if self.schema.user_id == "string" else np.int64
        first, last = (np.array([getattr(span, end) for span in spans], id_type) for end in ("min", "max"))
        return _Footer(path, num_bytes, metadata, first, last)

    def _empty(self) -> pa.Table:
        return self._arrow_schema.empty_table()


class RequestTable:
    """Requests by split and bucket."""

    def __init__(self, path: str, schema: EventSchema, version_id: str | None = None) -> None:
        self.version = open_version(path, schema, version_id, "jobs.build_requests")
        self.num_buckets: int = self.version.manifest["num_buckets"]
        self.schema = schema
        self._arrow_schema = schema.requests_arrow()

    def read(self, split: str, bucket: int) -> Requests:
        """All requests of a split ('train', 'valid' or 'test') in a bucket, by user and time."""
        files = self.version.files(f"split={split}/bucket={bucket:04d}/")
        return requests_of(read_columns(files[0]) if files else self._arrow_schema.empty_table(), self.schema)


def _rows_or_empty(histories: Histories, row: pa.Array, user_key_N: np.ndarray) -> Histories:
    """The histories' rows in the order of `row`; null rows are users without one."""
    known_N = row.is_valid().to_numpy(zero_copy_only=False)
    rows_N = pc.fill_null(row, 0).to_numpy(zero_copy_only=False)[known_N].astype(np.int64)
    some = histories.slice_events(rows_N, histories.first_index_B[rows_N], histories.end_index_B[rows_N])
    lengths_N = np.zeros(len(known_N), np.int64)
    first_N, prev_N = lengths_N.copy(), np.full(len(known_N), NO_EVENT_TS)
    lengths_N[known_N], first_N[known_N] = np.diff(some.offsets_B1), some.first_index_B
    prev_N[known_N] = some.prev_event_ts_B
    return Histories(
        user_key_B=user_key_N,
        offsets_B1=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_N)]),
        first_index_B=first_N,
        prev_event_ts_B=prev_N,
        event_ts_E=some.event_ts_E,
        features=some.features,
    )
