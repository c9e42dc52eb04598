"""A request on its way to a state, and the reads that it may need. No Ray, no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from longer.errors import StorageError, UserError
from longer.hashing import stable_keys
from longer.model.states import UserState
from longer.serving.history import HistorySource, TableRow
from longer.serving.requests import Source, now_ms


@dataclass
class Pending:
    """A request on its way to a state: who, when and the newest events; `source` and `state`, or `error`, when settled.

    `row` is what was read of its user, if that had to be.
    """

    user_id: pa.Array
    user_key: int
    request_ts: int
    events: pa.Table | None
    num_new_events: int = 0
    row: TableRow | None = None
    source: Source | None = None
    state: UserState | None = None
    error: UserError | None = None
    is_taken_in: bool = False

    @property
    def id(self) -> int | str:
        return self.user_id[0].as_py()

    def settle(self, source: Source, state: UserState) -> None:
        self.source, self.state, self.error = source, state, None


def pending_users(user_ids: pa.Array) -> list[Pending]:
    """These users as they are now."""
    now = now_ms()
    return [Pending(user_ids[n : n + 1], key, now, None) for n, key in enumerate(stable_keys(user_ids).tolist())]


def read_rows(history: HistorySource, requests: Sequence[Pending]) -> None:
    """The second step for these, bucket by bucket: each has its row, or its error where a bucket cannot be read."""
    buckets = history.buckets([request.user_key for request in requests])
    for bucket in dict.fromkeys(buckets):
        read_together(history, [request for request, its in zip(requests, buckets, strict=True) if its == bucket])


def read_together(history: HistorySource, requests: Sequence[Pending]) -> StorageError | None:
    """Gives each of these its row, or all of them the error that there was."""
    try:
        rows = history.read(pa.concat_arrays([request.user_id for request in requests]))
    except StorageError as error:
        for request in requests:
            request.error = error
        return error
    for request, row in zip(requests, rows, strict=True):
        request.row = row
    return None
