"""Ids that a user of a job names in Parquet files: read in pieces, checked, and spread over the buckets of users. No Ray."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longer.arrays import Int64
from longer.data.columns import single_array, sizes_of
from longer.data.parquet import read_columns
from longer.errors import UserError, one_line
from longer.files import arrow_filesystem, filesystem, open_input
from longer.hashing import bucket_of, stable_keys
from longer.storage import checked_output

_PIECE_IDS = 1 << 16
_PART_IDS = 1 << 23
_PART_BYTES = 1 << 28
_ROW_GROUP_IDS = 1 << 16
_SPOOL = "ids.parquet"
_MOST_BYTES = 2**31 - 1
"""Of strings in one array, and so in the list of a row."""


@dataclass(frozen=True)
class IdList:
    """The ids in `column` of a Parquet file, or of the Parquet files of a folder, local or S3; `setting` names it in mistakes."""

    path: str
    column: str
    type: pa.DataType
    setting: str

    @cached_property
    def files(self) -> dict[str, int]:
        """Full paths and sizes, sorted; a UserError if there are none."""
        fs, bare = filesystem(self.path)
        scheme = "s3://" if self.path.startswith("s3://") else ""
        found = {name: info["size"] for name, info in sorted(fs.find(bare, detail=True).items())}
        files = {scheme + name: size for name, size in found.items() if name.endswith(".parquet") or name == bare}
        if not files:
            raise UserError(
                f"{self.setting}={self.path}: no Parquet file there: name a file or a folder that holds some"
            )
        return files

    def digest(self) -> str:
        """Identifies the ids and their order, however they are cut into files and pages; a UserError if there are none."""
        hashed, num_ids = hashlib.sha256(), 0
        for piece in self.pieces():
            hashed.update(stable_keys(piece).tobytes())
            num_ids += len(piece)
        if not num_ids:
            raise UserError(f"{self.setting}={self.path}: names no {self.column}: name some, or leave the setting out")
        return hashed.hexdigest()[:12]

    def again(self, digest: str) -> Iterator[pa.Array]:
        """The pieces once more; a UserError after the last one if they are not those that had this digest."""
        hashed = hashlib.sha256()
        for piece in self.pieces():
            hashed.update(stable_keys(piece).tobytes())
            yield piece
        if hashed.hexdigest()[:12] != digest:
            raise UserError(f"{self.setting}={self.path}: changed while this run read it: run again once it is written")

    def pieces(self) -> Iterator[pa.Array]:
        """The ids in order, a few at a time, because they may be long; a UserError names a file that does not hold them."""
        for path, size in self.files.items():
            try:
                with pq.ParquetFile(open_input(path, size)) as file:
                    if self.column not in file.schema_arrow.names:
                        raise UserError(
                            f"{path}: no column {self.column}: {self.setting} needs one: rename the ids' column"
                        )
                    for batch in file.iter_batches(_PIECE_IDS, columns=[self.column]):
                        yield self._checked(path, batch.column(0))
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path}: not a readable Parquet file ({one_line(error)}): write it again") from None

    def _checked(self, path: str, ids: pa.Array) -> pa.Array:
        is_one = (
            pa.types.is_integer
            if self.type == pa.int64()
            else lambda t: pa.types.is_string(t) or pa.types.is_large_string(t)
        )
        if pa.types.is_dictionary(ids.type):
            ids = ids.dictionary_decode()
        if ids.null_count:
            raise UserError(f"{path}: {ids.null_count} rows without {self.column}: leave them out")
        if not is_one(ids.type):
            raise UserError(
                f"{path}: {self.column} is {ids.type}, the tables' is {self.type}: see event_schema.{self.column}"
            )
        try:
            ids = ids.cast(self.type)
        except pa.ArrowInvalid:  # of uint64 only
            raise UserError(
                f"{path}: {self.column} above the largest int64: the tables have none such: leave them out"
            ) from None
        is_text = self.type == pa.string()
        if num_unfit := (pc.equal(ids, "") if is_text else pc.less(ids, 0)).true_count:
            kind = "an empty" if is_text else "a negative"
            raise UserError(
                f"{path}: {num_unfit} rows with {kind} {self.column}: the import takes none such: leave them out"
            )
        return ids


def spool(ids: IdList, digest: str, folder: str) -> None:
    """Writes every id once, in the order of their first mention, for `read_spool`; a UserError as `again`, or of too many bytes."""
    pieces = [piece.unique() for piece in ids.again(digest)]
    try:
        distinct = pa.chunked_array(pieces, ids.type).unique()
    except pa.ArrowException as error:  # all that can go wrong with ids
        raise _too_much(ids) from error
    with checked_output(folder, _SPOOL) as sink:
        pq.write_table(pa.table({ids.column: distinct}), sink, compression="zstd")


def _too_much(ids: IdList, of_whom: str = "") -> UserError:
    return UserError(
        f"{ids.setting}={ids.path}: more than 2 GiB of {ids.column}{of_whom}: name fewer at once, or shorter ones"
    )


def read_spool(folder: str, column: str) -> pa.Array:
    """The ids that `spool` has written."""
    return single_array(read_columns(f"{folder}/{_SPOOL}")[column])


def spread(ids: IdList, digest: str, num_buckets: int, folder: str) -> Int64:
    """Writes the users' ids to `folder` in parts, each sorted by bucket; how many each bucket has, [P]. A UserError as `again`."""
    count_P, bytes_P = np.zeros((2, num_buckets), np.int64)
    for number, piece in enumerate(_joined(ids.again(digest))):
        bucket = bucket_of(stable_keys(piece), num_buckets)
        order = np.argsort(bucket, kind="stable")
        rows = pa.table({"bucket": pa.array(bucket[order]), ids.column: piece.take(pa.array(order))})
        with checked_output(folder, f"part-{number:05d}.parquet") as sink:
            pq.write_table(rows, sink, compression="zstd", row_group_size=_ROW_GROUP_IDS)
        count_P += np.bincount(bucket, minlength=num_buckets)
        bytes_P += np.bincount(bucket, sizes_of(piece), num_buckets).astype(np.int64)
    if pa.types.is_string(ids.type) and bytes_P.max() > _MOST_BYTES:
        raise _too_much(ids, " in one bucket of users")
    return count_P


def _joined(pieces: Iterable[pa.Array]) -> Iterator[pa.Array]:
    """The same ids in pieces of `_PART_IDS` or `_PART_BYTES` or some more, for small files too: each bucket opens every part."""
    held, num_ids, num_bytes = list[pa.Array](), 0, 0
    for piece in pieces:
        held.append(piece)
        num_ids += len(piece)
        num_bytes += piece.nbytes
        if num_ids >= _PART_IDS or num_bytes >= _PART_BYTES:
            yield pa.concat_arrays(held)
            held, num_ids, num_bytes = [], 0, 0
    if held:
        yield pa.concat_arrays(held)


def read_spread(folder: str, bucket: int, column: str) -> pa.Array:
    """The ids that `spread` has written for a bucket, ascending, each once. Reads only row groups that can hold some."""
    fs, bare = arrow_filesystem(folder)
    rows = pq.read_table(bare, filesystem=fs, columns=[column], filters=[("bucket", "=", bucket)], partitioning=None)
    ids = single_array(rows[column]).unique()
    return ids.take(pc.sort_indices(ids))
