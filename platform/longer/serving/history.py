"""Where the scorer reads what a user has done: the sequence table, at one version at a time. No torch, no Ray; local or S3."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from longer.arrays import Histories, Int64
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.schema import EventSchema
from longer.serving.cache import NEVER_TS
from longer.storage import Table
from longer.windows import WindowRule


class HistorySource:
    """Histories of users from the sequence table: the pinned version, or the one last moved to."""

    def __init__(self, path: str, schema: EventSchema, version_id: str | None = None) -> None:
        self._path, self._pinned = path, version_id is not None
        self._table = SequenceTable(path, schema, version_id)

    @property
    def version_id(self) -> str:
        return self._table.version.id

    def newer_version(self) -> str | None:
        """The table's served version if it is another than this source's; a pinned source never moves."""
        if self._pinned:
            return None
        served = Table(self._path).require("jobs.build_sequences").id
        return served if served != self.version_id else None

    def move_to(self, version_id: str) -> None:
        self._table = SequenceTable(self._path, self._table.schema, version_id)

    def read(self, user_ids: pa.Array) -> list["UserHistory"]:
        """One history a user, in order; empty for users who are not in the table."""
        histories = self._table.get(user_ids)
        return [UserHistory(histories, row) for row in range(len(histories))]


@dataclass(frozen=True)
class UserHistory:
    """One user's row of `histories`, by absolute event index."""

    histories: Histories
    row: int

    @property
    def first_index(self) -> int:
        """Absolute index of the first event that the table keeps."""
        return int(self.histories.first_index_B[self.row])

    @property
    def num_events(self) -> int:
        """Events that the table keeps of the user; none of one it does not know, whose state is not worth keeping."""
        return len(self._event_ts)

    @property
    def _event_ts(self) -> Int64:
        return self.histories.event_ts_E[self.histories.offsets_B1[self.row] : self.histories.offsets_B1[self.row + 1]]

    def end_before(self, request_ts: int) -> int:
        """Absolute index after the last event strictly before `request_ts`."""
        return self.first_index + int(np.searchsorted(self._event_ts, request_ts, side="left"))

    def next_ts(self, end: int) -> int:
        """Time of event `end`, the first that a history of the events before it lacks; NEVER_TS if there is none."""
        place = end - self.first_index
        return int(self._event_ts[place]) if place < len(self._event_ts) else NEVER_TS

    def events(self, start: int, end: int) -> Histories:
        """The events with absolute index in [start, end), as histories of this one user."""
        return self.histories.slice_events(np.array([self.row]), np.array([start]), np.array([end]))

    def window(self, end: int, windows: WindowRule) -> Histories:
        """The history window of the events before `end`; a UserError if the table no longer keeps all of it."""
        start = windows.history_start(end) * windows.merge_size
        if start < self.first_index:
            raise UserError(
                "request_ts: the sequence table no longer keeps the history of a request so far in the past: "
                "ask for a later time, or raise sequences.keep_events"
            )
        return self.events(start, end)

    def digest(self, start: int, end: int) -> bytes | None:
        """Identifies events [start, end), feature for feature; None if the table does not hold all of them.

        A state made from another table version is still exact if its events have the same digest here.
        """
        if start < self.first_index or end > self.first_index + len(self._event_ts):
            return None
        events = self.events(start, end)
        digest = hashlib.blake2b(digest_size=16)
        digest.update(np.array([start, end, events.prev_event_ts_B[0]], np.int64).tobytes())
        digest.update(events.event_ts_E.tobytes())
        for values in events.features.values():
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.digest()
