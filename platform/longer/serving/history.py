"""What a user has done: the sequence table, at one version at a time, and the events sent online that it does not have yet.

The history is the one that the table would hold had an increment brought those events: in its order, cut where it cuts. Of a
user whose oldest events the table has cut, an online event no younger than the last one cut is left out: whether the table
has counted it cannot be known any more.

No torch, no Ray; local or S3. B users, E events in all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longer.arrays import NO_EVENT_TS, Histories, Int64
from longer.data.columns import list_columns, milliseconds, single_array
from longer.data.events import iso_ms
from longer.data.parse import YEAR_1990_MS
from longer.data.sequences import KeepRule, Older, events_of, merge_sequences, order_events
from longer.data.tables import SequenceTable, histories_in_order
from longer.errors import UserError
from longer.hashing import bucket_of
from longer.schema import EventSchema
from longer.serving.cache import NEVER_TS
from longer.serving.fingerprint import EventPrint
from longer.serving.online import beyond
from longer.storage import Table, Version
from longer.table_settings import TimeUnit
from longer.windows import WindowRule


def check_kept(sequences: Version, windows: WindowRule) -> None:
    """A UserError if the table keeps fewer events than the model's history window may hold."""
    kept, needed = sequences.manifest["settings"]["keep_events"], windows.max_history_events
    if kept < needed:
        raise UserError(
            f"{sequences.path}: keeps {kept} events a user, but the model's history window needs {needed}: "
            "raise sequences.keep_events and build it again"
        )


class HistorySource:
    """Histories of users from the sequence table: the pinned version, or the one last moved to."""

    def __init__(self, path: str, schema: EventSchema, version_id: str | None = None) -> None:
        self.path, self._pinned = path, version_id is not None
        self._table = SequenceTable(path, schema, version_id)

    @property
    def version_id(self) -> str:
        return self._table.version.id

    @property
    def version(self) -> Version:
        return self._table.version

    @property
    def time_unit(self) -> TimeUnit:
        """Of events that come from outside: a log whose newest is before 1990 counts from a moment of its own."""
        return "relative_ms" if iso_ms(self.version.manifest["watermark"]) < YEAR_1990_MS else "ms"

    def newer(self) -> SequenceTable | None:
        """The table at its served version if that is another than this source's; a pinned source never moves. For any thread."""
        if self._pinned:
            return None
        served = Table(self.path).require("jobs.build_sequences").id
        return SequenceTable(self.path, self._table.schema, served) if served != self.version_id else None

    def move_to(self, newer: SequenceTable) -> None:
        self._table = newer

    def buckets(self, user_keys: list[int]) -> list[int]:
        """The bucket of the table, as it is now, that each user's row is in."""
        return bucket_of(np.array(user_keys, np.int64), self._table.num_buckets).tolist()

    def read(self, user_ids: pa.Array) -> list["TableRow"]:
        """What the table has of each user, in order. For any thread."""
        table = self._table
        wanted = table.ids(user_ids)
        rows = table.find(wanted)
        place_B = pc.index_in(wanted, single_array(rows["user_id"])).to_pylist()
        histories = histories_in_order(rows, wanted, table.schema)
        return [
            TableRow(
                table.version.id,
                rows.slice(0, 0) if place is None else rows.slice(place, 1),
                UserHistory(histories, row),
            )
            for row, place in enumerate(place_B)
        ]

    def with_online(
        self, user_ids: Sequence[pa.Array], rows: Sequence["TableRow"], online: pa.Table
    ) -> list["UserHistory"]:
        """One history a user, in order: the rows, of this very version, with the users' `online` events. Reads nothing.

        Whose online events are all younger than their row's has them added at its end; only others' rows are merged.
        """
        histories = [row.history for row in rows]
        if not len(online):
            return histories
        users = self._table.ids(pa.concat_arrays(user_ids))
        last_ts_B = np.array([history.last_event_ts for history in histories], np.int64)
        row_E = pc.index_in(online["user_id"], users).to_numpy()
        is_younger_E = milliseconds(single_array(online["event_ts"])) > last_ts_B[row_E]
        mixed = np.unique(row_E[~is_younger_E])
        end_B = np.array([history.end_index for history in histories], np.int64)
        for row, tail in enumerate(self.tails(users, online, end_B, last_ts_B)):
            histories[row] = histories[row].followed_by(tail, self._table.rule)
        if len(mixed):
            together = pa.concat_tables([rows[row].row for row in mixed]).combine_chunks()
            theirs = online.filter(pa.array(np.isin(row_E, mixed)))
            merged = _with_online(together, theirs, self._table.schema, self._table.rule)
            whole = histories_in_order(merged, users.take(pa.array(mixed)), self._table.schema)
            for place, row in enumerate(mixed.tolist()):
                histories[row] = UserHistory(whole, place)
        return histories

    def most_active(self, num_users: int) -> pa.Array:
        """Ids of the table's users with most events, the most active first."""
        return self._table.most_active(num_users)

    def tails(
        self, user_ids: pa.Array, events: pa.Table, first_index_B: Int64, prev_event_ts_B: Int64
    ) -> list["UserHistory"]:
        """What comes after states that hold all of the table and end with `prev_event_ts_B`: those of `events` that are younger,
        numbered from `first_index_B`. Reads nothing."""
        schema = self._table.schema
        after_E = prev_event_ts_B[pc.index_in(events["user_id"], user_ids).to_numpy()]
        events = events.filter(pa.array(milliseconds(single_array(events["event_ts"])) > after_E))
        order_E, start_U = order_events(events, schema)
        ordered = events.take(pa.array(order_E))
        fields = ordered.select([field.name for field in schema.event_fields()])
        columns = {
            "user_id": single_array(ordered["user_id"]).take(pa.array(start_U)),
            "first_index": np.zeros(len(start_U), np.int64),
            "prev_event_ts": pa.nulls(len(start_U), pa.int64()),
            **list_columns(np.append(start_U, len(ordered)), fields),
        }
        tails = histories_in_order(pa.table(columns), user_ids, schema)
        tails = replace(tails, first_index_B=first_index_B, prev_event_ts_B=prev_event_ts_B)
        return [UserHistory(tails, row) for row in range(len(tails))]


def _with_online(rows: pa.Table, online: pa.Table, schema: EventSchema, rule: KeepRule) -> pa.Table:
    """Rows of the sequence table with the online events merged in that have a place there and are not there yet."""
    users = single_array(rows["user_id"])
    row_E = pc.fill_null(pc.index_in(online["user_id"], users), -1).to_numpy()
    cut_until_U1 = np.append(milliseconds(single_array(rows["prev_event_ts"]), missing=int(NO_EVENT_TS)), NO_EVENT_TS)
    placed = online.filter(pa.array(milliseconds(single_array(online["event_ts"])) > cut_until_U1[row_E]))
    theirs = events_of(rows.filter(pc.is_in(users, single_array(placed["user_id"]))), schema)
    new = beyond(placed, theirs, schema)
    return merge_sequences(rows, new, Older.none(schema), schema, rule) if len(new) else rows


@dataclass(frozen=True)
class TableRow:
    """What one version of the table has of one user: the row, if there is one, and the history that it is without online events."""

    version_id: str
    row: pa.Table
    history: "UserHistory"


@dataclass(frozen=True)
class UserHistory:
    """One user's row of `histories`, by absolute event index."""

    histories: Histories
    row: int

    @property
    def first_index(self) -> int:
        """Absolute index of the first event here."""
        return int(self.histories.first_index_B[self.row])

    @property
    def num_events(self) -> int:
        """Events that are here of the user; none of one of whom nothing is known, whose state is not worth keeping."""
        return len(self._event_ts)

    @property
    def end_index(self) -> int:
        """Absolute index after the last event."""
        return self.first_index + len(self._event_ts)

    @property
    def _event_ts(self) -> Int64:
        return self.histories.event_ts_E[self.histories.offsets_B1[self.row] : self.histories.offsets_B1[self.row + 1]]

    @property
    def last_event_ts(self) -> int:
        """Time of the last event; `NO_EVENT_TS` if there is none."""
        return int(self._event_ts[-1]) if self.num_events else int(NO_EVENT_TS)

    def followed_by(self, tail: "UserHistory", rule: KeepRule) -> "UserHistory":
        """With the user's next events, cut where the table cuts."""
        if not tail.num_events:
            return self
        parts = [self.events(self.first_index, self.end_index), tail.events(tail.first_index, tail.end_index)]
        # Side by side they are one history: a copy, where `Histories.followed_by` would place 10,000 events one by one.
        both = Histories.concatenate(parts)
        joined = replace(
            both,
            user_key_B=both.user_key_B[:1],
            offsets_B1=both.offsets_B1[[0, -1]],
            first_index_B=both.first_index_B[:1],
            prev_event_ts_B=both.prev_event_ts_B[:1],
        )
        first = max(self.first_index, int(rule.first_index(np.array([tail.end_index]))[0]))
        return UserHistory(joined.of_row(0, first, tail.end_index), 0)

    def end_before(self, request_ts: int) -> int:
        """Absolute index after the last event strictly before `request_ts`."""
        return self.first_index + int(np.searchsorted(self._event_ts, request_ts, side="left"))

    def next_ts(self, end: int) -> int:
        """Time of event `end`, the first that a history of the events before it lacks; NEVER_TS if there is none."""
        place = end - self.first_index
        return int(self._event_ts[place]) if place < len(self._event_ts) else NEVER_TS

    def events(self, start: int, end: int) -> Histories:
        """The events with absolute index in [start, end), as histories of this one user; views."""
        return self.histories.of_row(self.row, start, end)

    def window(self, end: int, windows: WindowRule) -> Histories:
        """The history window of the events before `end`; a UserError if the table no longer keeps all of it."""
        start = windows.history_start(end) * windows.merge_size
        if start < self.first_index:
            raise UserError(
                "request_ts: the sequence table no longer keeps the history of a request so far in the past: "
                "ask for a later time, or raise sequences.keep_events"
            )
        return self.events(start, end)

    def holds(self, events: EventPrint) -> bool:
        """Whether these very events, with their gaps, are here at the same places.

        A state made from another table version, or before other events came, is still exact if its events are.
        """
        if events.first_index < self.first_index or events.end_index > self.end_index:
            return False
        return events.agrees_with(self.events(events.first_index, events.end_index))
