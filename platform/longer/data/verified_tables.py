"""Tables to verify, published or plain folders of Parquet, and one bucket of them streamed through the kernels. No Ray.

A bucket is read row group by row group: its sequences once in full; then its requests, and against each piece of them the times
of the sequence row groups that can hold its users. What stays in memory is one row group of each, 8 bytes a request, and the
bucket's news, which are merged into the rows as every reader does.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longer.arrays import Int64
from longer.data.columns import single_array
from longer.data.findings import Findings
from longer.data.layout import news_arrow
from longer.data.sequences import events_of, merge_sequences, older_of_news
from longer.data.tables import open_version
from longer.data.verification import HISTORY_COLUMNS, Promises, check_histories, check_requests, check_sequences
from longer.errors import StorageError, UserError, one_line
from longer.schema import EventSchema
from longer.storage import DataFile, Table, Version, arrow_filesystem, checksum, filesystem

_LAYOUT = re.compile(r"^(?:split=(?P<split>\w+)/|(?P<news>news)/)?bucket=(?P<bucket>\d+)/[^/]+\.parquet$")


@dataclass(frozen=True)
class TableFile:
    """A file of a table: `name` is its path in the table, `listed` the manifest's record of it, if there is a manifest."""

    path: str
    name: str
    bucket: int
    split: str | None
    is_news: bool
    listed: DataFile | None


@dataclass(frozen=True)
class Source:
    """A table to verify: a published version, or a plain folder (`version` is None)."""

    path: str
    version: Version | None
    files: tuple[TableFile, ...]

    def bucket(self, bucket: int) -> tuple[TableFile, ...]:
        return tuple(file for file in self.files if file.bucket == bucket)

    @property
    def title(self) -> str:
        return f"{self.path}, version {self.version.id}" if self.version else self.path


def open_source(path: str, schema: EventSchema, version_id: str | None, job: str) -> Source:
    """The pinned or served version of a table, or all Parquet files of a plain folder in the layout of a table.

    Raises UserError if there is neither, or a file lies elsewhere than under bucket=NNNN/ or split=NAME/bucket=NNNN/.
    """
    if version_id or Table(path).current():
        version = open_version(path, schema, version_id, job)
        paths = version.files()
        listed: list[DataFile] = version.data_files()
        return Source(path, version, tuple(_table_file(p, f.path, f, path) for p, f in zip(paths, listed, strict=True)))
    fs, bare = filesystem(path)
    names = sorted(name.removeprefix(bare).lstrip("/") for name in fs.find(bare) if name.endswith(".parquet"))
    if not names:
        raise UserError(
            f"{path}: no published table and no Parquet files: run `python -m {job}`, or name another folder"
        )
    return Source(path, None, tuple(_table_file(f"{path.rstrip('/')}/{name}", name, None, path) for name in names))


def _table_file(path: str, name: str, listed: DataFile | None, table: str) -> TableFile:
    place = _LAYOUT.match(name)
    if place is None:
        raise UserError(
            f"{table}: {name}: a table's files lie under bucket=NNNN/ or split=NAME/bucket=NNNN/: move this one"
        )
    return TableFile(path, name, int(place["bucket"]), place["split"], bool(place["news"]), listed)


@dataclass
class BucketReport:
    """What was checked in a bucket or in several, what is wrong, and what is only counted."""

    found: Findings
    noted: Findings
    checked: Counter[str] = field(default_factory=Counter)

    def merge(self, other: "BucketReport") -> None:
        self.found.merge(other.found)
        self.noted.merge(other.noted)
        self.checked += other.checked


@dataclass(frozen=True)
class _Piece:
    """One row group of an open sequence file with the news of its users, or the users of whom there are only news."""

    file: TableFile
    parquet: pq.ParquetFile | None
    row_group: int
    news: pa.Table
    """Rows of `news_arrow`."""
    first_user: object
    last_user: object


@dataclass(frozen=True)
class BucketVerifier:
    """Verifies one bucket; gives the request ids too, whose uniqueness shows only beside those of the other buckets."""

    promises: Promises
    max_shown: int

    def __call__(
        self, bucket: int, sequences: tuple[TableFile, ...], requests: tuple[TableFile, ...]
    ) -> tuple[BucketReport, Int64]:
        report = BucketReport(Findings(self.max_shown), Findings(self.max_shown))
        intact = [file for file in (*sequences, *requests) if _is_there(file, report)]
        pieces = self._sequences(bucket, [file for file in intact if file in sequences], report)
        ids = [
            self._requests(bucket, rows, file, pieces, report)
            for file in intact
            if file in requests
            for _, _, rows in _row_groups(file, self.promises.schema.requests_arrow(), report)
        ]
        return report, np.concatenate([np.zeros(0, np.int64), *ids])

    def _sequences(self, bucket: int, files: list[TableFile], report: BucketReport) -> list[_Piece]:
        schema = self.promises.schema
        wanted = schema.sequences_arrow()
        before, pieces = wanted.empty_table()["user_id"].combine_chunks(), []
        news = self._news([file for file in files if file.is_news], report)
        for file in files:
            if file.is_news:
                continue
            for parquet, row_group, rows in _row_groups(file, wanted, report):
                if not len(rows):
                    continue
                is_earlier = pc.less_equal(news["user_id"], rows["user_id"][-1])
                piece = self._piece(file, parquet, row_group, news.filter(is_earlier), rows)
                news = news.filter(pc.invert(is_earlier))
                before = self._check_piece(piece, self._with_news(rows, piece), bucket, before, report)
                pieces.append(piece)
            if len(news):
                piece = self._piece(file, None, 0, news, news)
                before = self._check_piece(piece, self._with_news(wanted.empty_table(), piece), bucket, before, report)
                pieces.append(piece)
        return pieces

    def _piece(
        self, file: TableFile, parquet: pq.ParquetFile | None, row_group: int, news: pa.Table, rows: pa.Table
    ) -> _Piece:
        spans = [pc.min_max(table["user_id"]) for table in (rows, news) if len(table)]
        first, last = min(span["min"].as_py() for span in spans), max(span["max"].as_py() for span in spans)
        return _Piece(file, parquet, row_group, news, first, last)

    def _check_piece(
        self, piece: _Piece, rows: pa.Table, bucket: int, before: pa.Array, report: BucketReport
    ) -> pa.Array:
        """Checks the rows and counts them; gives their last user."""
        check_sequences(rows, bucket, before, self.promises, report.found, piece.file.name)
        report.checked["users"] += len(rows)
        report.checked["events"] += pc.sum(rows["num_events_total"]).as_py() or 0
        report.checked["events kept"] += pc.sum(pc.list_value_length(rows["event_ts"])).as_py() or 0
        return single_array(rows["user_id"])[-1:]

    def _news(self, files: list[TableFile], report: BucketReport) -> pa.Table:
        """The bucket's news."""
        wanted = news_arrow(self.promises.schema)
        if files and self.promises.keep is None:
            raise UserError(f"{files[0].path}: news belong to a published table: name that table, not a folder in it")
        rows = [rows for file in files for _, _, rows in _row_groups(file, wanted, report)]
        return pa.concat_tables([wanted.empty_table(), *rows]).combine_chunks()

    def _with_news(self, rows: pa.Table, piece: _Piece) -> pa.Table:
        if not len(piece.news):
            return rows
        assert self.promises.keep
        schema = self.promises.schema
        return merge_sequences(
            rows, events_of(piece.news, schema), older_of_news(piece.news), schema, self.promises.keep
        )

    def _read_piece(self, piece: _Piece, columns: list[str]) -> pa.Table:
        """Some columns of a piece; where there are news, all are needed to know their order."""
        wanted = self.promises.schema.sequences_arrow()
        if not len(piece.news):
            wanted = pa.schema([wanted.field(name) for name in columns])
        rows = _read(piece.parquet, piece.row_group, wanted, piece.file.path) if piece.parquet else wanted.empty_table()
        return self._with_news(rows, piece).select(columns)

    def _requests(
        self, bucket: int, rows: pa.Table, file: TableFile, pieces: list[_Piece], report: BucketReport
    ) -> Int64:
        check_requests(rows, bucket, file.split, self.promises, report.found, file.name)
        asked = rows.select(["request_id", "user_id", "request_ts", "history_end"])
        for piece in _that_can_hold(asked, pieces):
            sequences = self._read_piece(piece, HISTORY_COLUMNS)
            is_here = check_histories(asked, sequences, self.promises, report.found, report.noted)
            asked = asked.filter(pa.array(~is_here))
        unknown = asked["request_id"]
        report.found.add(
            "unknown_user",
            np.ones(len(asked), bool),
            lambda row: f"request {unknown[row].as_py()}: user {asked['user_id'][row].as_py()}",
        )
        split = file.split or "all"
        report.checked["requests"] += len(rows)
        report.checked[f"requests of {split}"] += len(rows)
        report.checked[f"candidates of {split}"] += pc.sum(pc.list_value_length(rows["item_id"])).as_py() or 0
        return single_array(rows["request_id"].drop_null()).to_numpy()


def _that_can_hold(requests: pa.Table, pieces: list[_Piece]) -> list[_Piece]:
    """The pieces with a user of the requests between their first and last."""
    users = np.unique(single_array(requests["user_id"].drop_null()).to_numpy(zero_copy_only=False))
    first = np.array([piece.first_user for piece in pieces], users.dtype)
    last = np.array([piece.last_user for piece in pieces], users.dtype)
    some = np.searchsorted(users, first, side="left") < np.searchsorted(users, last, side="right")
    return [pieces[place] for place in np.flatnonzero(some)]


def _row_groups(
    file: TableFile, wanted: pa.Schema, report: BucketReport
) -> Iterator[tuple[pq.ParquetFile, int, pa.Table]]:
    """The open file, and each of its row groups with its rows; damage inside is a finding and ends the file."""
    arrow, bare = arrow_filesystem(file.path)
    try:
        parquet = pq.ParquetFile(arrow.open_input_file(bare), pre_buffer=True)
        missing = [name for name in wanted.names if name not in parquet.schema_arrow.names]
        if missing:
            raise UserError(f"{file.path}: no column {missing[0]!r}: give the table all columns of event_schema")
        for row_group in range(parquet.num_row_groups):
            yield parquet, row_group, _read(parquet, row_group, wanted, file.path)
    except (pa.ArrowException, OSError) as error:
        _raise_if_unreachable(error, file)
        report.found.add_one("unreadable", f"{file.path}: {one_line(error)}")


def _read(parquet: pq.ParquetFile, row_group: int, wanted: pa.Schema, path: str) -> pa.Table:
    rows = parquet.read_row_group(row_group, columns=wanted.names).select(wanted.names)
    try:
        return rows.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: not the columns of event_schema ({one_line(error)}): convert them") from None


def _is_there(file: TableFile, report: BucketReport) -> bool:
    """Whether the file exists; against the manifest's record, its size and checksum too."""
    try:
        if file.listed is None:
            return True
        fs, bare = filesystem(file.path)
        num_bytes = fs.info(bare)["size"]
        if num_bytes != file.listed.num_bytes:
            report.found.add_one("file_size", f"{file.path}: {num_bytes} bytes, not {file.listed.num_bytes}")
        elif checksum(file.path) != file.listed.sha256:
            report.found.add_one("checksum", file.path)
        report.checked["files"] += 1
        report.checked["bytes"] += num_bytes
    except FileNotFoundError:
        report.found.add_one("missing_file", file.path)
        return False
    except OSError as error:
        _raise_if_unreachable(error, file)
        raise
    return True


def _raise_if_unreachable(error: Exception, file: TableFile) -> None:
    """A file that cannot be reached proves nothing: what the operating system or the store says has an error number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise StorageError(
            f"{file.path}: cannot be read ({one_line(error)}): check the storage, then run again"
        ) from None
