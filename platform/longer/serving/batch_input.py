"""A bucket's questions in chunks of bounded size: requests as their table holds them, or users at one moment.

A chunk reads the histories of its own users only, so neither a bucket of users nor its requests are ever held whole.

B users, R requests, C candidates in all of them, I items.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longer.arrays import Histories, Int64, changes, offsets_of
from longer.data.batches import Requests, rows_of_requests
from longer.data.columns import (
    cut_lists,
    missing_features,
    plain_bytes,
    requests_of,
    single_array,
    slices,
)
from longer.data.id_lists import read_spool, read_spread
from longer.data.items import ItemTable, read_items
from longer.data.layout import bucket_files
from longer.data.parquet import open_encoded, read_columns
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.hashing import stable_keys
from longer.serving.batch_output import Run
from longer.serving.batch_plan import Plan
from longer.serving.questions import Questions
from longer.windows import WindowRule

_CHUNK_REQUESTS = 1 << 16
_CHUNK_EVENTS = 1 << 20
"""Enough users side by side to fill a GPU with one's next request at a time."""
_CHUNK_VALUES = 1 << 20
"""Candidates read, or scores kept, of a chunk; one request may have more."""
_CHUNK_BYTES = 64 << 20
"""The same of what is laid out for them: ids may be long."""
_READS_A_CHUNK = 16


@dataclass(frozen=True)
class Chunk:
    """Questions with whose they are; `first` is the first one's number in the bucket. Requests bring their rows along."""

    first: int
    questions: Questions
    user_id_R: pa.Array
    requests: Requests | None = None
    rows: pa.Table | None = None


@dataclass(frozen=True)
class Items:
    """I items: raw ids, and keys and features as the model reads them."""

    item_id_I: pa.Array
    features: dict[str, np.ndarray]

    @staticmethod
    def of(plan: Plan, run: Run) -> "Items":
        """The plan's candidates as the run has spooled them, or all of its catalogue."""
        if plan.candidates:
            ids = read_spool(run.candidates, plan.candidates.column)
        else:
            ids = single_array(read_items(plan.catalogue_path, plan.sequences.id, plan.schema)["item_id"])
        keys = np.concatenate([stable_keys(some) for some in slices(ids, _CHUNK_BYTES)])
        known = ItemTable(plan.items_path, plan.schema, plan.inputs["items"]).lookup(keys) if plan.items_path else {}
        return Items(ids, {"item_id": keys, **known, **missing_features(plan.schema, "request", len(ids))})


@dataclass(frozen=True)
class Reader:
    """The questions of a plan, bucket by bucket. A chunk is bounded by what a user's answer holds: numbers, and bytes at most."""

    plan: Plan
    sequences: SequenceTable
    run: Run
    windows: WindowRule
    outputs_a_request: int
    bytes_a_request: int

    def bucket(self, bucket: int) -> tuple[int, Iterator[Chunk]]:
        """How many questions a bucket has, and all of them, users ascending, a user's of a split in their table's order."""
        if self.plan.requests:
            files = self._request_files(bucket)
            return sum(file.metadata.num_rows for file in files), self._request_chunks(bucket, files)
        counts = _event_counts(self.sequences, bucket)
        users = read_spread(self.run.users, bucket, "user_id") if self.plan.users else single_array(counts["user_id"])
        return len(users), self._user_chunks(users, counts)

    def _request_files(self, bucket: int) -> list[pq.ParquetFile]:
        requests, files = self.plan.requests, self.plan.request_files.get(bucket, [])
        assert requests
        # rows of several are joined, which Arrow does not do with lists that are encoded
        encoded = self.plan.schema.features_of("item") if len(files) == 1 else ()
        return [open_encoded(requests.path_of(file), file.num_bytes, encoded) for file in files]

    def _request_chunks(self, bucket: int, files: list[pq.ParquetFile]) -> Iterator[Chunk]:
        schema, counts, first = self.plan.schema, _event_counts(self.sequences, bucket), 0
        names = [name for name in schema.requests_arrow().names if name not in schema.tasks]
        for together in _by_user([_tables(file, names, len(files)) for file in files]):
            for begin, end in _runs(single_array(together["user_id"]), counts, _CHUNK_REQUESTS):
                rows = together.slice(begin, end - begin)
                requests = requests_of(rows, schema, with_labels=False)
                histories = self.sequences.get(requests.user_id_R.unique())
                row_R = rows_of_requests(histories, requests)
                questions = Questions(histories, row_R, requests.history_end_R, requests.request_ts_R)
                self._check(questions)
                yield Chunk(first, questions, requests.user_id_R, requests, rows)
                first += len(rows)

    def _user_chunks(self, users: pa.Array, counts: pa.Table) -> Iterator[Chunk]:
        assert self.plan.request_ts is not None
        most = min(_CHUNK_VALUES // self.outputs_a_request, _CHUNK_BYTES // self.bytes_a_request)
        for begin, end in _runs(users, counts, min(_CHUNK_REQUESTS, max(1, most))):
            first = begin
            for some in slices(users[begin:end], _CHUNK_BYTES):
                histories = self.sequences.get(some)
                ts_R = np.full(len(some), self.plan.request_ts, np.int64)
                end_R = _ends_before(histories, self.plan.request_ts)
                questions = Questions(histories, np.arange(len(some)), end_R, ts_R)
                self._check(questions)
                yield Chunk(first, questions, some)
                first += len(some)

    def _check(self, questions: Questions) -> None:
        """A UserError if a history window is not all in the sequence table, or a history is not the events before its request.

        It counts those of this chunk: there may be more in others, whose histories are not read yet.
        """
        histories, row_R, end_R = questions.histories, questions.row_R, questions.history_end_R
        start_R = self.windows.history_start(end_R) * self.windows.merge_size
        path, model = (
            self.sequences.version.path,
            f"model.history_events={self.windows.history_groups * self.windows.merge_size}",
        )
        if num_cut := int((start_R < histories.first_index_B[row_R]).sum()):
            raise UserError(
                f"{model}: the history windows of at least {num_cut} {self.plan.asked} start before the events that {path} keeps: "
                "build sequences and requests again with these settings, ask for a later time, or lower history_events"
            )
        if requests := self.plan.requests:
            named = f"--verify.requests {requests.table_path} --verify.requests_version {requests.id}"
            verify = f"run `python -m jobs.verify {named}`, which names them"
            if num_beyond := int((end_R > histories.end_index_B[row_R]).sum()):
                raise UserError(
                    f"at least {num_beyond} {self.plan.asked} have more history than {path} holds of their users: {verify}"
                )
            if num_untimely := _num_untimely(questions):
                raise UserError(
                    f"at least {num_untimely} {self.plan.asked} have a history with events at or after their time, or without some "
                    f"before it: {verify}"
                )


def _event_counts(sequences: SequenceTable, bucket: int) -> pa.Table:
    """`user_id`, ascending, and about how many events the table keeps of each user of a bucket; no event is read but news."""
    files = bucket_files(sequences.version).get(bucket)
    if files is None:
        return pa.table({"user_id": pa.array([], sequences.schema.id_types[0]), "num_events": pa.array([], pa.int64())})
    kept = read_columns(sequences.version.path_of(files.rows), ["user_id", "first_index", "num_events_total"])
    counts = pa.table(
        {"user_id": kept["user_id"], "num_events": pc.subtract(kept["num_events_total"], kept["first_index"])}
    )
    if not files.news:
        return counts.combine_chunks()
    news = read_columns(sequences.version.path_of(files.news), ["user_id", "event_ts"])
    more = pa.table({"user_id": news["user_id"], "num_events": pc.list_value_length(news["event_ts"]).cast(pa.int64())})
    both = pa.concat_tables([counts, more]).group_by("user_id").aggregate([("num_events", "sum")])
    return both.rename_columns(["user_id", "num_events"]).sort_by("user_id").combine_chunks()


def _runs(user_ids: pa.Array, counts: pa.Table, max_rows: int) -> Iterator[tuple[int, int]]:
    """Where to cut rows so that each part has at most `max_rows`, and its users about `_CHUNK_EVENTS` events or one user."""
    if not len(user_ids):
        return
    place = pc.index_in(user_ids, single_array(counts["user_id"]))
    events_R = pc.fill_null(single_array(counts["num_events"]).take(place), 0).to_numpy(zero_copy_only=False)
    new_user_R = changes(pc.fill_null(place, -1).to_numpy(zero_copy_only=False))
    part_R = np.cumsum(np.where(new_user_R, events_R, 0)) // _CHUNK_EVENTS
    starts = np.flatnonzero(changes(part_R)).tolist()
    for begin, end in zip(starts, [*starts[1:], len(user_ids)], strict=True):
        for first in range(begin, end, max_rows):
            yield first, min(first + max_rows, end)


def _by_user(parts: list[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """The rows of parts that ascend by user, as one that does: in a table, of a user those of the first part come first.

    At most a table of each part is held. A user of whom a part has more comes in several tables, and the other parts' rows of the
    user in the first of them.
    """
    if len(parts) == 1:
        yield from parts[0]
        return
    heads = [next(part, None) for part in parts]
    while there := [head["user_id"][-1].as_py() for head in heads if head]:
        until, together = min(there), list[pa.Table]()
        for n, head in enumerate(heads):
            if head:
                size = pc.less_equal(single_array(head["user_id"]), until).true_count
                together.append(head.slice(0, size))
                heads[n] = head.slice(size) if size < len(head) else next(parts[n], None)
        rows = pa.concat_tables(together)
        yield rows.take(pc.sort_indices(rows["user_id"])).combine_chunks()  # which keeps the order of equal ones


def _tables(file: pq.ParquetFile, names: list[str], num_parts: int = 1) -> Iterator[pa.Table]:
    """The file's rows in tables of at most `_CHUNK_REQUESTS`, `_CHUNK_VALUES` candidates and `_CHUNK_BYTES`, or one request.

    Of so many parts of what is held at once this is one. Each row group's lists of strings have a dictionary of their own.
    """
    held, num_values, num_bytes = list[pa.RecordBatch](), 0, 0
    most_requests, most_values = max(1, _CHUNK_REQUESTS // num_parts), max(1, _CHUNK_VALUES // num_parts)
    most_bytes = _CHUNK_BYTES // num_parts
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(_rows_at_once(file.metadata), row_groups=[group], columns=names):
            for begin, end in cut_lists(batch["item_id"], most_requests, most_values):
                for part in slices(batch.slice(begin, end - begin), most_bytes):
                    values_more, bytes_more = len(part["item_id"].flatten()), plain_bytes(part)
                    is_full = num_values + values_more > most_values or num_bytes + bytes_more > most_bytes
                    if held and (is_full or sum(map(len, held)) + len(part) > most_requests):
                        yield pa.Table.from_batches(held)
                        held, num_values, num_bytes = [], 0, 0
                    held.append(part)
                    num_values += values_more
                    num_bytes += bytes_more
    if held:
        yield pa.Table.from_batches(held)


def _rows_at_once(metadata: pq.FileMetaData) -> int:
    """Requests that have about a part of `_CHUNK_VALUES` candidates, by the averages of row groups, of which none has many more.

    A part, because how long their ids are is only seen once they are read.
    """
    columns = [metadata.schema.column(c).path.split(".")[0] for c in range(metadata.num_columns)]
    item_column = columns.index("item_id")
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    most = max((g.column(item_column).num_values / max(1, g.num_rows) for g in groups), default=1.0)
    return int(min(_CHUNK_REQUESTS, max(1, _CHUNK_VALUES // _READS_A_CHUNK // max(1.0, most))))


def _num_untimely(questions: Questions) -> int:
    """Questions whose history is not the events strictly before their time."""
    histories, row_R, end_R = questions.histories, questions.row_R, questions.history_end_R
    time_X = np.append(histories.event_ts_E, 0)  # there is none after the last, nor before the first
    next_R = histories.offsets_B1[row_R] + end_R - histories.first_index_B[row_R]
    sees_more_R = (end_R > histories.first_index_B[row_R]) & (time_X[next_R - 1] >= questions.request_ts_R)
    sees_less_R = (end_R < histories.end_index_B[row_R]) & (time_X[next_R] < questions.request_ts_R)
    return int((sees_more_R | sees_less_R).sum())


def _ends_before(histories: Histories, request_ts: int) -> Int64:
    """Absolute index after each user's last event strictly before a moment, [B]."""
    before = offsets_of(histories.event_ts_E < request_ts)
    return histories.first_index_B + np.diff(before[histories.offsets_B1])
