"""Every way in which a table can break its promises is found and named, whatever the log; a table that keeps them passes."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from longer.data.findings import KINDS, Findings
from longer.data.sequences import KeepRule
from longer.data.verification import (
    HISTORY_COLUMNS,
    Promises,
    check_histories,
    check_requests,
    check_sequences,
    repeated,
)
from longer.data.verified_files import open_source
from longer.data.verified_tables import BucketVerifier
from longer.errors import UserError
from longer.schema import EventSchema
from longer.windows import WindowRule
from tests.data.logs import BASKETS, STRINGS, generated_log, log, logs
from tests.data.test_requests import SPLIT, as_rows, build, sequences_of

RULE = KeepRule(24, 4)
WINDOWS = WindowRule(merge_size=2, history_groups=4, query_groups=2, stride_groups=2)
Rows = list[dict[str, Any]]
Change = Callable[[Rows, Rows], object]


def promises(schema: EventSchema = BASKETS, complete: bool = True) -> Promises:
    return Promises(schema, 1, 4, WINDOWS, RULE, SPLIT, ordered_ties=True, complete_histories=complete)


def tables_of(events: pa.Table, schema: EventSchema = BASKETS) -> tuple[Rows, Rows]:
    """Clean rows of both tables; requests whose window the table cut are left out, as the job leaves them."""
    sequences = sequences_of(events, schema, RULE)
    first = {row["user_id"]: row["first_index"] for row in sequences.to_pylist()}
    requests = [
        row
        for row in build([sequences], schema)
        if WINDOWS.history_start(row["history_end"]) * WINDOWS.merge_size >= first[row["user_id"]]
    ]
    return sequences.to_pylist(), requests


def kinds_in(
    sequences: Rows, requests: Rows, schema: EventSchema = BASKETS, complete: bool = True, split: str | None = None
) -> Findings:
    """What the kernels find in these rows, taken as one bucket."""
    found, noted, rules = Findings(3), Findings(3), promises(schema, complete)
    stored = pa.Table.from_pylist(sequences, schema.sequences_arrow())
    asked = pa.Table.from_pylist(requests, schema.requests_arrow())
    check_sequences(stored, 0, stored["user_id"].combine_chunks()[:0], rules, found, "part-0")
    check_requests(asked, 0, split, rules, found, "part-0")
    check_histories(asked, stored.select(HISTORY_COLUMNS), rules, found, noted)
    return found


LOG = log(as_rows(generated_log(num_users=6, num_days=12, seed=5)))


@given(logs(max_events=80), st.sampled_from([BASKETS, STRINGS]))
def test_tables_built_from_any_log_are_clean(events: pa.Table, schema: EventSchema) -> None:
    assert kinds_in(*tables_of(log(as_rows(events), schema), schema), schema).counts == {}


@given(logs(max_events=80), st.data())
def test_every_change_of_a_history_end_is_found(events: pa.Table, data: st.DataObject) -> None:
    sequences, requests = tables_of(events)
    assume(requests)
    request = data.draw(st.sampled_from(requests))
    request["history_end"] += data.draw(st.integers(-90, 90).filter(bool))
    found = kinds_in(sequences, requests)
    assert found.counts
    assert str(request["request_id"]) in str(found.shown)


@given(logs(max_events=80), st.data())
def test_every_change_of_a_first_index_is_found(events: pa.Table, data: st.DataObject) -> None:
    sequences, requests = tables_of(events)
    row = data.draw(st.sampled_from(sequences))
    row["first_index"] += data.draw(st.integers(-90, 90).filter(bool))
    assert f"user {row['user_id']} " in str(kinds_in(sequences, requests).shown["length"])


@given(logs(max_events=80), st.data())
def test_every_event_moved_past_a_neighbour_or_before_its_own_request_is_found(
    events: pa.Table, data: st.DataObject
) -> None:
    """Times that move within their gap and cross no request change no order and no history: only a checksum shows them."""
    sequences, requests = tables_of(events)
    row = data.draw(st.sampled_from(sequences))
    times, place = row["event_ts"], data.draw(st.integers(0, len(row["event_ts"]) - 1))
    day = timedelta(days=data.draw(st.integers(1, 5)))
    later = data.draw(st.booleans()) and place + 1 < len(times)
    times[place] = times[place + 1] + day if later else times[max(place - 1, 0)] - day
    found = kinds_in(sequences, requests).counts
    assert {"time_order", "stale_history", "prev_event_order"} & set(found)


@given(logs(max_events=80), st.data())
def test_an_event_at_or_after_a_request_is_seen_even_where_times_are_in_no_order(
    events: pa.Table, data: st.DataObject
) -> None:
    sequences, requests = tables_of(events)
    for row in sequences:
        row["event_ts"] = data.draw(st.permutations(row["event_ts"]))
    by_user = {row["user_id"]: row for row in sequences}
    expected: dict[str, int] = {"future_event": 0, "stale_history": 0}
    for request in requests:
        row = by_user[request["user_id"]]
        held = request["history_end"] - row["first_index"]
        before = [row["prev_event_ts"]] if row["prev_event_ts"] else []
        expected["future_event"] += any(t >= request["request_ts"] for t in before + row["event_ts"][:held])
        expected["stale_history"] += any(t < request["request_ts"] for t in row["event_ts"][held:])
    found = kinds_in(sequences, requests).counts
    assert {kind: found[kind] for kind in expected} == expected


def at(rows: Rows, place: int = 2, **values: Any) -> None:
    rows[place].update(values)


def swap_users(rows: Rows) -> None:
    rows[1], rows[2] = rows[2], rows[1]


def reversed_tie(rows: Rows) -> None:
    row = rows[2]
    place = next(i for i, t in enumerate(row["event_ts"][1:]) if t == row["event_ts"][i] and varies(row, i))
    for values in (row["item_id"], row["category"], row["quantity"]):
        values[place], values[place + 1] = values[place + 1], values[place]


def drop_oldest(row: dict[str, Any], num_events: int) -> None:
    """A shorter row that is right in itself."""
    row.update(first_index=row["first_index"] + num_events, prev_event_ts=row["event_ts"][num_events - 1])
    row.update({name: values[num_events:] for name, values in row.items() if isinstance(values, list)})


def varies(row: dict[str, Any], place: int) -> bool:
    return row["item_id"][place] != row["item_id"][place + 1]


PLANTED: dict[str, Change] = {
    "null": lambda s, r: at(r, history_end=None),
    "null (a label)": lambda s, r: at(r, label=[None, *r[2]["label"][1:]]),
    "null (an event time)": lambda s, r: at(s, event_ts=[None, *s[2]["event_ts"][1:]]),
    "list_length": lambda s, r: at(s, quantity=s[2]["quantity"][1:]),
    "list_length (labels)": lambda s, r: at(r, label=[*r[2]["label"], 1.0]),
    "user_order": lambda s, r: swap_users(s),
    "duplicate_user": lambda s, r: s.insert(2, s[2]),
    "time_order": lambda s, r: at(s, event_ts=s[2]["event_ts"][::-1]),
    "tie_order": lambda s, r: reversed_tie(s),
    "first_index": lambda s, r: at(s, first_index=2),
    "length": lambda s, r: at(s, num_events_total=s[2]["num_events_total"] + 1),
    "keep_events": lambda s, r: drop_oldest(s[2], 4),
    "prev_event_ts": lambda s, r: at(s, prev_event_ts=None),
    "prev_event_order": lambda s, r: at(s, prev_event_ts=s[2]["event_ts"][-1] + timedelta(days=1)),
    "wrong_split": lambda s, r: None,
    "history_range": lambda s, r: at(r, history_end=10_000),
    "history_range (negative)": lambda s, r: at(r, history_end=-1),
    "future_event": lambda s, r: at(r, history_end=r[2]["history_end"] + 1),
    "future_event (just before the first kept)": lambda s, r: at(
        r, user_id=s[2]["user_id"], history_end=s[2]["first_index"], request_ts=s[2]["prev_event_ts"]
    ),
    "stale_history": lambda s, r: at(r, request_ts=r[2]["request_ts"] + timedelta(days=3)),
    "cut_window": lambda s, r: at(r, history_end=0),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_violation_is_found_and_named(planted: str) -> None:
    sequences, requests = tables_of(LOG)
    kind = planted.split(" ")[0]
    split = "test" if kind == "wrong_split" else None
    assert kinds_in(sequences, requests).counts == {}
    PLANTED[planted](sequences, requests)
    found = kinds_in(sequences, requests, split=split)
    assert kind in found.counts
    names = [
        f"request {requests[2]['request_id']}",
        f"user {sequences[2]['user_id']}",
        f"user {sequences[1]['user_id']}",
    ]
    assert kind == "wrong_split" or any(name in text for text in found.shown[kind] for name in names)


def test_a_history_that_lags_is_a_violation_only_where_completeness_is_promised() -> None:
    sequences, requests = tables_of(LOG)
    requests[-1]["history_end"] -= 1
    assert kinds_in(sequences, requests).counts == {"stale_history": 1}
    assert kinds_in(sequences, requests, complete=False).counts == {}


def test_a_repeated_id_is_given_as_often_as_it_is_too_many() -> None:
    assert repeated(pa.array([3, 1, 3, 2, 3]).to_numpy()).tolist() == [3, 3]


BUCKETS = {"sequences": "bucket=0000/mine.parquet", "requests": "split=train/bucket=0000/mine.parquet"}


def write_plain(
    folder: Path, sequences: Rows, requests: Rows, row_group_rows: int = 2, places: dict[str, str] = BUCKETS
) -> tuple[str, str]:
    for name, rows, schema in (
        ("sequences", sequences, BASKETS.sequences_arrow()),
        ("requests", requests, BASKETS.requests_arrow()),
    ):
        file = folder / name / places[name]
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=row_group_rows)
    return str(folder / "sequences"), str(folder / "requests")


def verify_plain(folders: tuple[str, str]) -> tuple[Any, Any]:
    mine = [open_source(folder, BASKETS, None, "jobs.x") for folder in folders]
    return BucketVerifier(Promises(BASKETS, 1, 4, WINDOWS), 3)(0, mine[0].files, mine[1].files)


@pytest.mark.parametrize("order", ["by user", "shuffled"])
def test_a_plain_folder_is_verified_with_its_requests_in_any_order(tmp_path: Path, order: str) -> None:
    sequences, requests = tables_of(LOG)
    if order == "shuffled":
        requests = requests[1::2] + requests[::2]
    leak = requests[7]
    leak["history_end"] += 1
    requests[9]["user_id"] = 999
    report, ids = verify_plain(write_plain(tmp_path, sequences, requests))
    assert set(report.found.counts) == {"future_event", "unknown_user"}
    assert f"request {leak['request_id']}: " in report.found.shown["future_event"][0]
    assert sorted(ids.tolist()) == sorted(row["request_id"] for row in requests)
    assert (report.checked["users"], report.checked["requests"]) == (len(sequences), len(requests))


LOOSE = {"sequences": "sequences.parquet", "requests": "split=train/a/b.parquet"}


@pytest.mark.parametrize("places", [BUCKETS, LOOSE])
def test_files_that_are_each_sorted_are_clean_and_a_user_in_two_of_them_is_found(
    tmp_path: Path, places: dict[str, str]
) -> None:
    sequences, requests = tables_of(LOG)
    other = {name: place.replace(".parquet", "-2.parquet") for name, place in places.items()}
    write_plain(tmp_path, sequences[1::2], requests[1::2], places=places)
    folders = write_plain(tmp_path, sequences[::2], requests[::2], places=other)
    report, _ = verify_plain(folders)
    assert report.found.counts == {}
    assert (report.checked["users"], report.checked["requests of train"]) == (len(sequences), len(requests))
    write_plain(tmp_path, sequences[1::2], requests[1::2], places=other)
    found = verify_plain(folders)[0].found
    assert found.counts["duplicate_user"] == len(sequences[1::2])
    assert "user_order" not in found.counts


def test_a_request_of_a_user_without_events_has_an_empty_history_and_nothing_else(tmp_path: Path) -> None:
    sequences, requests = tables_of(LOG)
    requests[1].update(user_id=999, history_end=0)
    folders = write_plain(tmp_path, sequences, requests)
    assert verify_plain(folders)[0].found.counts == {}
    requests[1].update(history_end=1)
    requests[2].update(user_id=998, history_end=None)
    found = verify_plain(write_plain(tmp_path, sequences, requests))[0].found
    assert found.counts == {"unknown_user": 2, "null": 1}


def test_a_row_in_another_bucket_than_its_users_is_found(tmp_path: Path) -> None:
    sequences, requests = (open_source(f, BASKETS, None, "") for f in write_plain(tmp_path, *tables_of(LOG)))
    report, _ = BucketVerifier(Promises(BASKETS, 64, 4, WINDOWS), 3)(0, sequences.files, requests.files)
    assert report.found.counts["wrong_bucket"] > 6
    assert "belongs in" in report.found.shown["wrong_bucket"][0]


def test_memory_does_not_grow_with_the_table_since_one_row_group_is_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = log(as_rows(generated_log(num_users=80, num_days=4, seed=2)))
    folders = write_plain(tmp_path, *tables_of(events))
    read: list[int] = []
    real = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, *args: Any, **kwargs: Any) -> pa.Table:
        rows = real(self, *args, **kwargs)
        read.append(len(rows))
        return rows

    def whole(*_: Any, **__: Any) -> None:
        raise AssertionError("a file was read whole")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    for name in ("read", "read_row_groups"):
        monkeypatch.setattr(pq.ParquetFile, name, whole)
    monkeypatch.setattr(pq, "read_table", whole)
    report, _ = verify_plain(folders)
    assert report.found.counts == {}
    assert max(read) == 2
    pieces = 40 + report.checked["requests"] / 2
    assert len(read) < 2.5 * pieces, "sequences were read again and again though requests come by user"


def test_a_plain_folder_in_another_layout_and_a_missing_column_are_one_line_each(tmp_path: Path) -> None:
    sequences, requests = write_plain(tmp_path, *tables_of(LOG))
    with pytest.raises(UserError, match=r"nothing: no published table and no Parquet files: run `python -m jobs.x`"):
        open_source(f"{tmp_path}/nothing", BASKETS, None, "jobs.x")
    pq.write_table(pa.table({"user_id": [1]}), f"{sequences}/bucket=0000/z.parquet")
    with pytest.raises(UserError, match=r"z.parquet: no column 'first_index'"):
        verify_plain((sequences, requests))
    pq.write_table(pa.table({"user_id": [1]}), f"{sequences}/loose.parquet")
    with pytest.raises(UserError, match=r"loose.parquet: a table's files lie under bucket=NNNN/"):
        open_source(sequences, BASKETS, None, "jobs.x")


def test_damage_inside_a_file_is_named_and_the_rest_is_verified(tmp_path: Path) -> None:
    sequences, requests = write_plain(tmp_path, *tables_of(LOG))
    Path(f"{requests}/split=train/bucket=0000/z.parquet").write_bytes(b"PAR1 no longer")
    report, ids = verify_plain((sequences, requests))
    assert report.found.counts == {"unreadable": 1}
    assert "z.parquet" in report.found.shown["unreadable"][0]
    assert len(ids) == report.checked["requests"] > 0


def test_only_so_many_of_a_kind_are_put_into_words_and_all_are_counted() -> None:
    sequences, requests = tables_of(LOG)
    for row in requests:
        row["history_end"] = 10_000
    found = kinds_in(sequences, requests)
    assert found.counts["history_range"] == len(requests)
    assert len(found.shown["history_range"]) == 3


def test_every_kind_has_a_test() -> None:
    elsewhere = {"wrong_bucket", "unreadable", "unknown_user", "unmerged", "statistics", "num_older"}
    on_ray = {"missing_file", "file_size", "checksum", "row_count", "manifest", "sequence_version", "duplicate_request"}
    of_impressions = {
        "impressions_version",
        "unknown_request",
        "lost_request",
        "request_feature",
        "candidates",
        "candidate_feature",
        "label",
    }
    assert {planted.split(" ")[0] for planted in PLANTED} | elsewhere | on_ray | of_impressions == set(KINDS)
