"""One bucket of the tables to verify, streamed through the kernels. No Ray.

A bucket is read row group by row group: its sequences in full, as they lie; where news lie beside them, once more, merged as
every reader does; then its requests, and against each piece of them the times of the sequence row groups that can hold its users.
What stays in memory is one row group of each, 8 bytes a request, the bucket's news, and the users of a bucket in several files; of
requests made from impressions, all impressions of the bucket too.
Rows or news that are not what they should be are not merged: they are reported, and so is what stays unchecked.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longer.arrays import Int64
from longer.data.columns import milliseconds, single_array
from longer.data.findings import BucketReport, Findings
from longer.data.layout import news_arrow
from longer.data.sequences import events_of, merge_sequences, older_of_news
from longer.data.verification import (
    HISTORY_COLUMNS,
    Promises,
    check_histories,
    check_news,
    check_requests,
    check_sequences,
    num_groups,
)
from longer.data.verified_files import TableFile, is_there, read_rows, row_groups
from longer.data.verified_impressions import Due, ShownRequests, check_shown, is_cut_of
from longer.errors import UserError


@dataclass(frozen=True)
class _Piece:
    """One row group of an open sequence file with the news, rows of `news_arrow`, that are merged into it."""

    file: TableFile
    parquet: pq.ParquetFile
    row_group: int
    news: pa.Table
    first_user: Any
    last_user: Any


@dataclass(frozen=True)
class BucketVerifier:
    """Verifies one bucket; gives the request ids too, whose uniqueness shows only beside those of the other buckets."""

    promises: Promises
    max_shown: int
    impressions: ShownRequests | None = None

    def __call__(
        self, bucket: int, sequences: tuple[TableFile, ...], requests: tuple[TableFile, ...]
    ) -> tuple[BucketReport, Int64]:
        report = BucketReport(Findings(self.max_shown), Findings(self.max_shown))
        pieces = self._sequences(bucket, sequences, report)
        due = self.impressions.of_bucket(bucket) if self.impressions else None
        ids = [
            self._requests(bucket, rows, file, pieces, due, report)
            for file in requests
            if is_there(file, report)
            for _, _, rows in row_groups(file, self.promises.schema.requests_arrow(), report)
        ]
        all_ids = np.concatenate([np.zeros(0, np.int64), *ids])
        if due and pieces is not None:
            self._lost(due, all_ids, pieces, report)
        return report, all_ids

    def _sequences(self, bucket: int, files: tuple[TableFile, ...], report: BucketReport) -> list[_Piece] | None:
        """The pieces of the bucket's sequences, checked; None where there are news and they cannot be merged."""
        news_files = [file for file in files if file.is_news]
        if news_files and self.promises.keep is None:
            raise UserError(
                f"{news_files[0].path}: news belong to a published table: name that table, not a folder in it"
            )
        intact = [file for file in files if is_there(file, report)]
        num_before = report.found.num_violations
        pieces = self._rows(bucket, [file for file in intact if not file.is_news], not news_files, report)
        news = self._news(bucket, [file for file in intact if file.is_news], report)
        if not news_files:
            return pieces
        are_whole = len(intact) == len(files) == 2 and bool(pieces)
        if not are_whole or report.found.num_violations > num_before:
            report.found.add_one("unmerged", f"bucket {bucket:04d}: its merged rows, histories and counts")
            return None
        return [self._check_merged(bucket, piece, report) for piece in _with_news(pieces, news)]

    def _rows(self, bucket: int, files: list[TableFile], is_all: bool, report: BucketReport) -> list[_Piece]:
        """The rows as they lie, checked, and counted if they are all that the bucket has."""
        wanted, no_news = self.promises.schema.sequences_arrow(), news_arrow(self.promises.schema).empty_table()
        pieces, users = [], []
        for file in files:
            before = no_news["user_id"].combine_chunks()
            in_file = [before]
            for parquet, row_group, rows in row_groups(file, wanted, report):
                check_sequences(rows, bucket, before, self.promises, report.found, file.name)
                self._check_statistics(parquet, row_group, rows, file, report)
                if is_all:
                    self._count(rows, report)
                known = single_array(rows["user_id"].drop_null())
                if len(known):
                    span = pc.min_max(known).as_py()
                    pieces.append(_Piece(file, parquet, row_group, no_news, span["min"], span["max"]))
                    before = known[-1:]
                if len(files) > 1:
                    in_file.append(known)
            users.append(pc.unique(pa.chunked_array(in_file)))
        if len(files) > 1:
            times = pc.value_counts(pa.concat_arrays(users))
            twice = times.filter(pc.greater(times.field("counts"), 1)).field("values")
            report.found.add(
                "duplicate_user", np.ones(len(twice), bool), lambda row: f"user {twice[row].as_py()} in several files"
            )
        return pieces

    def _news(self, bucket: int, files: list[TableFile], report: BucketReport) -> pa.Table:
        """The bucket's news, checked as they lie."""
        wanted = news_arrow(self.promises.schema)
        before, parts = wanted.empty_table()["user_id"].combine_chunks(), [wanted.empty_table()]
        for file in files:
            for parquet, row_group, rows in row_groups(file, wanted, report):
                check_news(rows, bucket, before, self.promises, report.found, file.name)
                self._check_statistics(parquet, row_group, rows, file, report)
                before = single_array(pa.chunked_array([before, *rows["user_id"].chunks]).drop_null())[-1:]
                parts.append(rows)
        return pa.concat_tables(parts).combine_chunks()

    def _check_statistics(
        self, parquet: pq.ParquetFile, row_group: int, rows: pa.Table, file: TableFile, report: BucketReport
    ) -> None:
        """Of a published table: its first column is the user, and each row group says what users it holds."""
        if not file.listed or not len(known := rows["user_id"].drop_null()):
            return
        column, span = parquet.metadata.row_group(row_group).column(0), pc.min_max(known).as_py()
        said = column.statistics
        is_said = column.path_in_schema == "user_id" and said and said.has_min_max
        if not is_said or {"min": said.min, "max": said.max} != span:
            text = f"{file.path}: row group {row_group}, of users {span['min']} to {span['max']}"
            report.found.add_one("statistics", text)

    def _check_merged(self, bucket: int, piece: _Piece, report: BucketReport) -> _Piece:
        rows = self._read_piece(piece, self.promises.schema.sequences_arrow().names)
        nobody = single_array(rows["user_id"])[:0]
        if len(piece.news):
            check_sequences(rows, bucket, nobody, self.promises, report.found, f"{piece.file.name} with its news")
        self._count(rows, report)
        return piece

    def _count(self, rows: pa.Table, report: BucketReport) -> None:
        report.checked["users"] += len(rows)
        report.checked["events"] += pc.sum(rows["num_events_total"]).as_py() or 0
        report.checked["events kept"] += pc.sum(pc.list_value_length(rows["event_ts"])).as_py() or 0
        report.checked["request groups"] += num_groups(rows, self.promises.schema)
        kept = single_array(rows["event_ts"]).flatten()
        for times in (kept, single_array(rows["prev_event_ts"])):
            known = milliseconds(times.drop_null())
            report.oldest_ms = min(report.oldest_ms, int(known.min(initial=report.oldest_ms)))
            report.newest_ms = max(report.newest_ms, int(known.max(initial=report.newest_ms)))

    def _merged(self, rows: pa.Table, piece: _Piece) -> pa.Table:
        """The rows of a piece with its news, as every reader merges them."""
        if not len(piece.news):
            return rows
        assert self.promises.keep
        schema = self.promises.schema
        news = events_of(piece.news, schema)
        return merge_sequences(rows, news, older_of_news(piece.news), schema, self.promises.keep)

    def _read_piece(self, piece: _Piece, columns: list[str]) -> pa.Table:
        """Some columns of a piece; where there are news, all are needed to know their order."""
        wanted = self.promises.schema.sequences_arrow()
        if not len(piece.news):
            wanted = pa.schema([wanted.field(name) for name in columns])
        rows = read_rows(piece.parquet, piece.row_group, wanted, piece.file.path)
        return self._merged(rows, piece).select(columns)

    def _requests(
        self,
        bucket: int,
        rows: pa.Table,
        file: TableFile,
        pieces: list[_Piece] | None,
        due: Due | None,
        report: BucketReport,
    ) -> Int64:
        check_requests(rows, bucket, file.split, self.promises, report.found, file.name)
        if due:
            check_shown(rows, due, self.promises.schema, report.found, file.name)
        if pieces is not None:
            self._histories(rows, pieces, report)
        split = file.split or "all"
        report.checked["requests"] += len(rows)
        report.checked[f"requests of {split}"] += len(rows)
        report.checked[f"candidates of {split}"] += pc.sum(pc.list_value_length(rows["item_id"])).as_py() or 0
        return single_array(rows["request_id"].drop_null()).to_numpy()

    def _histories(self, requests: pa.Table, pieces: list[_Piece], report: BucketReport) -> None:
        """Histories against the pieces that can hold their users; a user with no sequence has an empty one."""
        asked = requests.select(["request_id", "user_id", "request_ts", "history_end"])
        for piece in _that_can_hold(asked, pieces):
            sequences = self._read_piece(piece, HISTORY_COLUMNS)
            is_here = check_histories(asked, sequences, self.promises, report.found, report.noted)
            asked = asked.filter(pa.array(~is_here))
        unknown = asked.filter(pc.fill_null(pc.not_equal(asked["history_end"], 0), True))
        report.found.add(
            "unknown_user",
            np.ones(len(unknown), bool),
            lambda row: f"request {unknown['request_id'][row].as_py()}: user {unknown['user_id'][row].as_py()}",
        )

    def _lost(self, due: Due, ids: Int64, pieces: list[_Piece], report: BucketReport) -> None:
        """Requests of the impressions that the table has not: after the newest event, cut, or lost."""
        assert self.impressions
        missing = due.requests.filter(pa.array(~np.isin(due.requests["request_id"].to_numpy(), ids)))
        later = milliseconds(single_array(missing["request_ts"])) > self.impressions.until_ms
        report.checked["requests later"] += int(later.sum())
        missing = missing.filter(pa.array(~later))
        for piece in _that_can_hold(missing, pieces):
            is_cut = is_cut_of(missing, self._read_piece(piece, HISTORY_COLUMNS), self.promises.windows)
            report.checked["requests cut"] += int(is_cut.sum())
            missing = missing.filter(pa.array(~is_cut))
        report.found.add(
            "lost_request",
            np.ones(len(missing), bool),
            lambda row: f"request {missing['request_id'][row].as_py()}: user {missing['user_id'][row].as_py()}",
        )


def _with_news(pieces: list[_Piece], news: pa.Table) -> list[_Piece]:
    """The pieces of a bucket, ascending, each with the news of users after the piece before; the last with all that are left."""
    users = single_array(news["user_id"]).to_numpy(zero_copy_only=False)
    last = np.array([piece.last_user for piece in pieces[:-1]], users.dtype)
    bounds = [0, *np.searchsorted(users, last, side="right").tolist(), len(news)]
    merged = []
    for piece, begin, end in zip(pieces, bounds[:-1], bounds[1:], strict=True):
        first_user, last_user = piece.first_user, piece.last_user
        if begin < end:
            first_user, last_user = min(first_user, users[begin]), max(last_user, users[end - 1])
        part = news.slice(begin, end - begin)
        merged.append(replace(piece, news=part, first_user=first_user, last_user=last_user))
    return merged


def _that_can_hold(requests: pa.Table, pieces: list[_Piece]) -> list[_Piece]:
    """The pieces with a user of the requests between their first and last."""
    users = np.unique(single_array(requests["user_id"].drop_null()).to_numpy(zero_copy_only=False))
    first = np.array([piece.first_user for piece in pieces], users.dtype)
    last = np.array([piece.last_user for piece in pieces], users.dtype)
    some = np.searchsorted(users, first, side="left") < np.searchsorted(users, last, side="right")
    return [pieces[place] for place in np.flatnonzero(some)]
