"""What a right result holds, from the log itself: a time counts only for a result that agrees.

Each user's events are counted and their hashes (of item, time and action) summed, which does not depend on order; the order
is checked on its own, by times that never fall within a list. Together that is "sorted by time, ties in any order".

U users, ids 1 to U
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.regroup.job import COLUMNS, LISTS
from longer.data.columns import flat_list
from longer.data.tables import SequenceTable
from longer.hashing import hash_int64, stable_keys
from longer.schema import TIMESTAMP, EventSchema

_BATCH_EVENTS = 1 << 20
_BATCH_USERS = 1_000


@dataclass
class Digest:
    """By user id: how many events, the sum of their hashes, and how many rows hold them."""

    num_events_U: npt.NDArray[np.int64]
    hash_U: npt.NDArray[np.uint64]
    num_rows_U: npt.NDArray[np.int64]

    @staticmethod
    def empty(num_users: int) -> "Digest":
        size = num_users + 1
        return Digest(np.zeros(size, np.int64), np.zeros(size, np.uint64), np.zeros(size, np.int64))

    def add(self, user_id_E: npt.NDArray[np.int64], events: dict[str, pa.Array]) -> None:
        time = events["event_ts"].cast(TIMESTAMP).cast(pa.int64()).to_numpy(zero_copy_only=False)
        item = hash_int64(events["item_id"].to_numpy(zero_copy_only=False)).view(np.int64)
        both = hash_int64(item + time).view(np.int64)
        self.num_events_U += np.bincount(user_id_E, minlength=len(self.num_events_U))
        np.add.at(self.hash_U, user_id_E, hash_int64(both + stable_keys(events["action"])))


def digest_log(files: Iterable[str], num_users: int) -> Digest:
    """Of the flat log."""
    digest = Digest.empty(num_users)
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(_BATCH_EVENTS, columns=list(COLUMNS)):
            digest.add(batch["user_id"].to_numpy(), {name: batch[name] for name in LISTS})
    return digest


def rows_of_files(files: Iterable[str]) -> Iterator[pa.Table]:
    """The rows of a result that lies in files."""
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(_BATCH_USERS, columns=list(COLUMNS)):
            yield pa.Table.from_batches([batch])


def rows_of_table(path: str) -> Iterator[pa.Table]:
    """The rows of this platform's table as its readers see them, news of the last increment merged in."""
    table = SequenceTable(path, EventSchema())
    for bucket in table.buckets:
        yield table.rows(bucket).select(list(COLUMNS)).combine_chunks()


def problem_of(result_rows: Iterable[pa.Table], log: Digest) -> str:
    """What is wrong with a result, if anything."""
    result = Digest.empty(len(log.hash_U) - 1)
    for rows in result_rows:
        users = rows["user_id"].to_numpy()
        lists = {name: flat_list(rows[name]) for name in LISTS}
        offsets, times = lists["event_ts"]
        if any(not np.array_equal(offsets, other) for other, _ in lists.values()):
            return "wrong: lists of one user differ in length"
        np.add.at(result.num_rows_U, users, 1)
        result.add(np.repeat(users, np.diff(offsets)), {name: values for name, (_, values) in lists.items()})
        falls = np.flatnonzero(np.diff(pc.cast(times, pa.int64()).to_numpy(zero_copy_only=False)) < 0) + 1
        if not np.isin(falls, offsets).all():
            return "wrong: events of one user are not in the order of time"
    if (result.num_rows_U > 1).any():
        return "wrong: a user has more than one row"
    if not np.array_equal(result.num_events_U, log.num_events_U) or not np.array_equal(result.hash_U, log.hash_U):
        return "wrong: some users' events are not those of the log"
    return ""
