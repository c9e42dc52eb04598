"""Rows and the news beside them, as an increment leaves them: whatever is wrong in either is found, named and merged by nobody."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import build_sequences
from longer.data.findings import BucketReport
from longer.data.layout import news_path, rows_path
from longer.data.sequences import KeepRule
from longer.data.tables import SequenceTable
from longer.data.verification import Promises
from longer.data.verified_files import Source, open_source
from longer.data.verified_tables import BucketVerifier
from longer.windows import WindowRule
from tests.data import test_increments as increments
from tests.data.logs import BASKETS, log
from tests.data.test_verification import write_plain

Rows = list[dict[str, Any]]
WINDOWS = WindowRule(merge_size=2, history_groups=2, query_groups=1, stride_groups=1)
PROMISES = Promises(BASKETS, 1, 2, WINDOWS, KeepRule(1000, 2), ordered_ties=True, complete_histories=True)


@pytest.fixture
def grown(tmp_path: Path) -> Source:
    """A table of one bucket: eight users, news of two of them, and two more of whom there are only news."""
    chosen = increments.settings_of(tmp_path, num_buckets=1, keep_events=1000, merge_share=10.0)
    first = increments.add_events(
        chosen, log([(user, day, day % 9 + 1, 1) for user in range(2, 10) for day in range(4)]), None
    )
    with increments.in_this_process():
        build_sequences.run(chosen)
        increments.add_events(chosen, log([(user, 4, item, 2) for user in (1, 3, 4, 20) for item in (5, 6)]), first)
        version = build_sequences.run(chosen, since_last=True)
    assert [file.path for file in version.data_files()] == [rows_path(0), news_path(0)]
    return open_source(chosen.path("tables", "sequences"), BASKETS, version.id, "")


def file_of(table: Source, is_news: bool) -> str:
    (path,) = (file.path for file in table.files if file.is_news == is_news)
    return path


def rewrite(path: str, change: Callable[[Rows], object], **how: Any) -> None:
    old = pq.read_table(path, partitioning=None)
    rows = old.to_pylist()
    change(rows)
    nullable = pa.schema([field.with_nullable(True) for field in old.schema])
    pq.write_table(pa.Table.from_pylist(rows, nullable), path, **{"row_group_size": 2, **how})


def verify(table: Source) -> BucketReport:
    """As the manifest would be if it were consistent with the files as they lie."""
    files = []
    for file in table.files:
        assert file.listed
        as_it_lies = replace(file.listed, num_bytes=Path(file.path).stat().st_size)
        files.append(replace(file, listed=as_it_lies))
    report, _ = BucketVerifier(PROMISES, 3)(0, tuple(files), ())
    report.found.counts.pop("checksum", None)
    return report


def test_rows_and_news_that_are_right_are_verified_merged(grown: Source) -> None:
    rewrite(file_of(grown, is_news=True), lambda rows: None)
    rewrite(file_of(grown, is_news=False), lambda rows: None)
    report = verify(grown)
    assert report.found.counts == {}
    assert (report.checked["users"], report.checked["events"]) == (10, 8 * 4 + 8)


def change(place: int, **values: Any) -> Callable[[Rows], object]:
    return lambda rows: rows[place].update(values)


def shorten(name: str) -> Callable[[Rows], object]:
    return lambda rows: rows[1].update({name: rows[1][name][1:]})


def forget_users(rows: Rows) -> None:
    for row in rows[:2]:  # a row group
        row["user_id"] = None


IN_EITHER: dict[str, Callable[[Rows], object]] = {
    "user_order": lambda rows: rows.reverse(),
    "duplicate_user": lambda rows: rows.insert(1, rows[1]),
    "wrong_bucket": lambda rows: None,
    "null (all users of a row group)": forget_users,
    "null (a user)": change(1, user_id=None),
    "null (a list of times)": change(1, event_ts=None),
    "null (a list of items)": change(1, item_id=None),
    "null (a time)": lambda rows: rows[1]["event_ts"].__setitem__(0, None),
    "null (an item)": lambda rows: rows[1]["item_id"].__setitem__(0, None),
    "list_length": shorten("quantity"),
    "list_length (times)": shorten("event_ts"),
    "unreadable": lambda rows: None,
    "missing_file": lambda rows: None,
    "statistics": lambda rows: None,
}
IN_ROWS: dict[str, Callable[[Rows], object]] = {
    "null (first_index)": change(1, first_index=None),
    "null (num_events_total)": change(1, num_events_total=None),
    "first_index": change(1, first_index=-2000, num_events_total=-1996),
    "length": change(1, num_events_total=2),
    "keep_events": change(1, first_index=10**6, num_events_total=10**6 + 4),
    "time_order": lambda rows: rows[1]["event_ts"].reverse(),
    "prev_event_ts": lambda rows: rows[1].update(prev_event_ts=rows[1]["event_ts"][0]),
}

IN_NEWS: dict[str, Callable[[Rows], object]] = {
    "num_older": change(1, num_older=-5),
    "null (num_older)": change(1, num_older=None),
}


@pytest.mark.parametrize(
    ("planted", "is_news"),
    [(kind, is_news) for kind in IN_EITHER for is_news in (False, True)]
    + [(kind, False) for kind in IN_ROWS]
    + [(kind, True) for kind in IN_NEWS],
)
def test_what_is_wrong_in_rows_or_in_news_is_found_and_not_merged(
    grown: Source, planted: str, is_news: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kind = file_of(grown, is_news), planted.split(" ")[0]
    rewrite(path, (IN_EITHER | IN_ROWS | IN_NEWS)[planted], write_statistics=kind != "statistics")
    if kind == "unreadable":
        content = Path(path).read_bytes()
        Path(path).write_bytes(b"\0" * (len(content) - 8) + content[-8:])
    elif kind == "wrong_bucket":
        other = replace(PROMISES, num_buckets=7)
        monkeypatch.setattr(f"{__name__}.PROMISES", other)
    found = verify_without(grown, path) if kind == "missing_file" else verify(grown).found
    assert kind in found.counts
    assert found.counts["unmerged"] == 1
    assert "bucket 0000" in found.shown["unmerged"][0]
    assert kind == "null" or "null" not in found.counts


def verify_without(table: Source, path: str) -> Any:
    Path(path).unlink()
    return BucketVerifier(PROMISES, 3)(0, table.files, ())[0].found


def test_news_that_a_point_read_would_miss_are_no_clean_table(grown: Source) -> None:
    """The finding that made news be checked as they lie: a whole bucket is read right, one user is not."""
    rewrite(file_of(grown, is_news=True), lambda rows: rows.reverse())
    table = SequenceTable(grown.path, BASKETS, grown.version.id if grown.version else None)
    users = table.rows(0)["user_id"].combine_chunks()
    assert len(table.get(users).event_ts_E) < len(table.read_bucket(0)[1].event_ts_E)
    assert verify(grown).found.counts["user_order"] > 0


def test_a_row_group_of_null_users_in_a_plain_folder_is_no_traceback(tmp_path: Path, grown: Source) -> None:
    rows = pq.read_table(file_of(grown, is_news=False), partitioning=None).to_pylist()
    forget_users(rows)
    requests = [
        {"request_id": user, "user_id": user, "request_ts": rows[0]["event_ts"][0], "history_end": 0}
        | {"item_id": [1], "category": ["c1"], "label": [1.0]}
        for user in (4, 5)
    ]
    mine = [open_source(folder, BASKETS, None, "") for folder in write_plain(tmp_path / "mine", rows, requests)]
    report, _ = BucketVerifier(Promises(BASKETS, 1, 2, WINDOWS), 3)(0, mine[0].files, mine[1].files)
    assert report.found.counts == {"null": 2}
