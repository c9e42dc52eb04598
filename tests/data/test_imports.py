"""Imports of generic logs: bad input is told apart or refused in one line, and increments share what is already there."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from jobs import import_events
from longer.data import days
from longer.errors import UserError
from longer.storage import Table, Version
from tests.data.import_logs import MAY_1_S, day, settings_of, write_day


def rows_of(version: Version, files: list[str] | None = None) -> list[dict]:
    found = files or version.files()
    if not found:
        return []
    return ds.dataset(found).to_table().sort_by([("item_id", "ascending")]).to_pylist()


def quarantined(root: Path, version: Version) -> list[dict]:
    unfit = Table(f"{root}/tables/quarantine").find(version.id)
    assert unfit is not None
    return rows_of(unfit)


def tables_left(root: Path) -> list[Path]:
    """All files but the tables' locks, which are never removed."""
    return sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_events_lie_by_utc_day_and_a_rerun_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(3):
        write_day(tmp_path / "log", number)
    settings = settings_of(tmp_path / "run", tmp_path / "log")
    version = import_events.run(settings)
    assert sorted({path.split("/")[-2] for path in version.files()}) == [f"dt=2019-05-0{n}" for n in (1, 2, 3)]
    expected = [row for number in range(3) for row in pa.table(day(number)).to_pylist()]
    assert [row["item_id"] for row in rows_of(version)] == [row["item_id"] for row in expected]
    assert version.manifest["num_rows"] == 60
    assert version.manifest["first_event_ts"] == "2019-05-01T00:00:00.000+00:00"
    assert set(version.manifest["inputs"].values()) == {f"day-{number}.parquet" for number in range(3)}
    assert import_events.run(settings).manifest == version.manifest
    assert "nothing changed" in capsys.readouterr().err


def test_each_kind_of_unfit_row_is_quarantined_with_raw_values_reason_and_file(tmp_path: Path) -> None:
    good = (MAY_1_S + 5) * 1000
    rows: list[tuple[dict[str, Any], str]] = [
        ({"user_id": None}, "null user_id"),
        ({"item_id": None}, "null item_id"),
        ({"user_id": -4}, "negative user_id"),
        ({"item_id": -4}, "negative item_id"),
        ({"event_ts": None}, "missing or unparsable event_ts"),
        ({"event_ts": -5}, "event_ts before 1970"),
        ({"event_ts": good * 50}, "event_ts in the future"),
        ({"event_ts": good // 1000}, "event_ts fits s, not ms"),
        ({"event_ts": good * 1000}, "event_ts fits us, not ms"),
        ({"event_ts": good * 1000_000}, "event_ts fits ns, not ms"),
        ({"event_ts": 20190501}, "event_ts fits YYYYMMDD, not ms"),
    ]
    base = {"user_id": 1, "item_id": 2, "event_ts": good, "action": "view", "price": 1.5}
    table = pa.Table.from_pylist(
        [{**base, **change, "price": place} for place, (change, _) in enumerate(rows)] + [base]
    )
    (tmp_path / "log").mkdir()
    pq.write_table(table, tmp_path / "log/mixed.parquet")
    version = import_events.run(settings_of(tmp_path / "run", tmp_path / "log"))
    assert version.manifest["num_rows"] == 1
    assert version.manifest["reasons"] == {reason: 1 for _, reason in rows}
    unfit = sorted(quarantined(tmp_path / "run", version), key=lambda row: float(row["price"]))
    assert [row["reason"] for row in unfit] == [reason for _, reason in rows]
    assert unfit[7]["event_ts"] == str(good // 1000)
    assert {row["source_file"] for row in unfit} == {f"{tmp_path}/log/mixed.parquet"}


def test_csv_values_that_do_not_parse_are_rows_with_a_reason_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,event_ts,action,price\n"
        f"1,2,{MAY_1_S},view,9.5\n"
        f"one,2,{MAY_1_S},view,9.5\n"
        f"1,2.5,{MAY_1_S},view,9.5\n"
        "1,2,soon,view,9.5\n"
        f"1,2,{MAY_1_S},view,cheap\n"
        f"1,2,{MAY_1_S},view\n"
        f"1,2,{MAY_1_S},,\n"
    )
    version = import_events.run(settings_of(tmp_path / "run", tmp_path / "log.csv", time_unit="s"))
    assert version.manifest["num_rows"] == 2
    assert version.manifest["reasons"] == {
        "user_id is not an integer": 1,
        "item_id is not an integer": 1,
        "missing or unparsable event_ts": 1,
        "price is not a number": 1,
        "not 5 fields": 1,
    }
    torn = [row for row in quarantined(tmp_path / "run", version) if row["line"]]
    assert [row["line"] for row in torn] == [f"1,2,{MAY_1_S},view"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_of_text_where_integers_were_is_one_line_and_some_such_rows_are_quarantined(
    suffix: str, tmp_path: Path
) -> None:
    def write(items: list[str]) -> None:
        table = pa.table({**day(1, 100), "item_id": items})
        if suffix == "csv":
            table.to_pandas().to_csv(tmp_path / "log/day-1.csv", index=False)
        else:
            pq.write_table(table, tmp_path / "log/day-1.parquet")

    write_day(tmp_path / "log", 0)
    write([f"sku-{place}" for place in range(100)])
    with pytest.raises(UserError, match=rf"day-1.{suffix}: item_id is not an integer in any of 100 rows") as caught:
        import_events.run(settings_of(tmp_path / "run", tmp_path / "log"))
    assert "\n" not in str(caught.value)
    assert tables_left(tmp_path / "run") == []
    write([str(place) if place else "sku-0" for place in range(100)])
    version = import_events.run(settings_of(tmp_path / "run", tmp_path / "log"))
    assert version.manifest["reasons"] == {"item_id is not an integer": 1}
    assert version.manifest["num_rows"] == 119


def test_a_small_file_of_bad_rows_alone_does_not_fail_the_import(tmp_path: Path) -> None:
    header = "user_id,item_id,event_ts,action,price\n"
    (tmp_path / "a.csv").write_text(header + f"1,2,{MAY_1_S},view,1\n" * 1000)
    (tmp_path / "b.csv").write_text(header + f"one,2,{MAY_1_S},view,1\n")
    settings = settings_of(tmp_path / "run", f"{tmp_path}/*.csv", time_unit="s", max_quarantined_share=0.01)
    version = import_events.run(settings)
    assert version.manifest["num_rows"] == 1000
    assert version.manifest["reasons"] == {"user_id is not an integer": 1}


def test_zones_and_units_of_timestamps_may_differ_between_files(tmp_path: Path) -> None:
    moments = day(0)["event_ts"]
    kinds = [pa.timestamp("ms"), pa.timestamp("us", "Asia/Shanghai"), pa.timestamp("ns", "UTC"), pa.timestamp("s")]
    for number, kind in enumerate(kinds):
        times = pa.array(moments, pa.timestamp("ms")).cast(pa.timestamp(kind.unit)).cast(kind)
        write_day(tmp_path / "log", number, event_ts=times)
    version = import_events.run(settings_of(tmp_path / "run", tmp_path / "log"))
    times = [int(row["event_ts"].timestamp() * 1000) for row in rows_of(version)]
    assert times == moments * 4


def test_a_truncated_file_fails_whole_and_named_or_is_skipped_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for number in range(3):
        write_day(tmp_path / "log", number)
    cut = tmp_path / "log/day-1.parquet"
    cut.write_bytes(cut.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"day-1.parquet: not a readable Parquet file.*skip_unreadable_files") as caught:
        import_events.run(settings_of(tmp_path / "run", tmp_path / "log"))
    assert "\n" not in str(caught.value)
    assert tables_left(tmp_path / "run") == []
    settings = settings_of(tmp_path / "run", tmp_path / "log", skip_unreadable_files=True)
    version = import_events.run(settings)
    assert (version.manifest["num_rows"], version.manifest["num_skipped_files"]) == (40, 1)
    assert "day-1.parquet" in capsys.readouterr().err
    assert "day-1.parquet" not in version.manifest["inputs"].values()
    assert import_events.run(settings, since_last=True).id == version.id, "the same damage again is nothing new"
    write_day(tmp_path / "log", 1)
    repaired = import_events.run(settings, since_last=True)
    assert repaired.manifest["num_rows"] == 60


def test_a_file_damaged_after_its_first_rows_leaves_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(days, "_RUN_BYTES", 1)
    monkeypatch.setattr("longer.datasets.readers._BATCH_ROWS", 10)
    path = tmp_path / "log/day-0.parquet"
    write_day(tmp_path / "log", 0)
    pq.write_table(pa.table(day(0)), path, row_group_size=10, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    content[offset : offset + 20] = b"\xff" * 20
    path.write_bytes(content)
    write_day(tmp_path / "log", 1)
    version = import_events.run(settings_of(tmp_path / "run", tmp_path / "log", skip_unreadable_files=True))
    assert version.manifest["num_rows"] == 20
    written = {str(path) for path in (tmp_path / "run/tables/events").rglob("*.parquet")}
    assert written == set(version.files())


def test_of_a_large_file_with_one_damaged_stretch_no_other_stretch_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longer.datasets.source._STRETCH_BYTES", 1000)
    write_day(tmp_path / "log", 1)
    path = tmp_path / "log/day-0.parquet"
    pq.write_table(pa.table(day(0, 400)), path, row_group_size=100, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(2).column(1).data_page_offset
    content[offset : offset + 20] = b"\xff" * 20
    path.write_bytes(content)
    version = import_events.run(settings_of(tmp_path / "run", tmp_path / "log", skip_unreadable_files=True))
    assert (version.manifest["num_rows"], version.manifest["skipped"]) == (20, ["day-0.parquet"])
    written = {str(path) for path in (tmp_path / "run/tables/events").rglob("*.parquet")}
    assert written == set(version.files())


def test_an_empty_day_is_no_mistake_and_is_not_read_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_day(tmp_path / "log", 0)
    (tmp_path / "log/empty.csv").write_text("")
    (tmp_path / "log/header.csv").write_text("user_id,item_id,event_ts,action,price\n")
    pq.write_table(pa.table(day(5)).slice(0, 0), tmp_path / "log/empty.parquet")
    settings = settings_of(tmp_path / "run", tmp_path / "log")
    assert import_events.run(settings).manifest["num_rows"] == 20
    capsys.readouterr()
    import_events.run(settings, since_last=True)
    assert "nothing changed" in capsys.readouterr().err


def test_the_same_bytes_under_two_names_are_imported_once_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = write_day(tmp_path / "log", 0).read_bytes()
    (tmp_path / "log/day-0-copy.parquet").write_bytes(content)
    version = import_events.run(settings_of(tmp_path / "run", tmp_path / "log"))
    assert version.manifest["num_rows"] == 20
    assert "day-0.parquet: the same bytes as day-0-copy.parquet, imported once" in capsys.readouterr().err


def test_a_log_of_which_every_file_was_skipped_says_why(tmp_path: Path) -> None:
    write_day(tmp_path / "log", 0)
    settings = settings_of(
        tmp_path / "run", tmp_path / "log", skip_unreadable_files=True, columns={"user_id": "custmer"}
    )
    with pytest.raises(UserError, match=r"every file was skipped, one because of .*no column 'custmer'"):
        import_events.run(settings)


def test_a_column_that_disappears_names_the_file_and_one_that_appears_is_ignored(tmp_path: Path) -> None:
    write_day(tmp_path / "log", 0, colour=["red"] * 20)
    pq.write_table(pa.table(day(1)).drop_columns(["price"]), tmp_path / "log/day-1.parquet")
    remedy = r"map 'price' in the import's columns, to null \('price: null'\) if the log has no such feature;"
    with pytest.raises(UserError, match=rf"day-1.parquet: no column 'price' \(it has user_id,.*\): {remedy}"):
        import_events.run(settings_of(tmp_path / "run", tmp_path / "log"))
    write_day(tmp_path / "log", 1)
    assert import_events.run(settings_of(tmp_path / "run", tmp_path / "log")).manifest["num_rows"] == 40


def test_too_many_unfit_rows_fail_with_the_top_reason_and_leave_the_last_version(tmp_path: Path) -> None:
    write_day(tmp_path / "log", 0)
    settings = settings_of(tmp_path / "run", tmp_path / "log", max_quarantined_share=0.1)
    first = import_events.run(settings)
    write_day(tmp_path / "log", 1, user_id=[None] * 5 + [-1] * 2 + [1] * 13)
    for since_last in (True, False, True):
        with pytest.raises(UserError, match=r"7 of \d0 rows are unfit, 5 of them: null user_id; see .*quarantine"):
            import_events.run(settings, since_last=since_last)
    served = Table(f"{tmp_path}/run/tables/events").current()
    assert served is not None
    assert served.id == first.id


def test_names_are_mapped_and_a_log_without_actions_has_one(tmp_path: Path) -> None:
    table = pa.table(day(0)).drop_columns(["action"]).rename_columns(["who", "what", "when", "price"])
    (tmp_path / "log").mkdir()
    pq.write_table(table, tmp_path / "log/a.parquet")
    columns = {"user_id": "who", "item_id": "what", "event_ts": "when", "action": None}
    version = import_events.run(settings_of(tmp_path / "run", tmp_path / "log", columns=columns))
    assert {row["action"] for row in rows_of(version)} == {"event"}
    assert [row["item_id"] for row in rows_of(version)] == day(0)["item_id"]


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_log_without_a_feature_is_imported_with_the_feature_missing(tmp_path: Path, ending: str) -> None:
    table = pa.table(day(0)).drop_columns(["price"])
    (tmp_path / "log").mkdir()
    write = pq.write_table if ending == "parquet" else pacsv.write_csv
    write(table, f"{tmp_path}/log/a.{ending}")
    version = import_events.run(settings_of(tmp_path / "run", tmp_path / "log", columns={"price": None}))
    assert [row["price"] for row in rows_of(version)] == [None] * 20
    assert [row["item_id"] for row in rows_of(version)] == day(0)["item_id"]


def test_new_files_are_added_and_the_served_versions_files_are_shared_not_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    log, settings = tmp_path / "log", settings_of(tmp_path / "run", tmp_path / "log")
    write_day(log, 0, user_id=[None] + [1] * 19)
    write_day(log, 1)
    first = import_events.run(settings, since_last=True)
    assert import_events.run(settings, since_last=True).id == first.id
    assert "nothing changed" in capsys.readouterr().err
    write_day(log, 2, user_id=[-1] + [1] * 19)
    os.remove(log / "day-0.parquet")  # the source keeps a few days only
    (log / "day-1-again.parquet").write_bytes((log / "day-1.parquet").read_bytes())
    second = import_events.run(settings, since_last=True)
    assert "day-1-again.parquet: the same bytes as day-1.parquet" in capsys.readouterr().err
    assert set(first.files()) < set(second.files())
    assert second.manifest["base"] == first.id
    assert second.manifest["num_rows"] == 58
    assert second.manifest["num_new_rows"] == 19
    assert second.manifest["reasons"] == {"null user_id": 1, "negative user_id": 1}
    assert len(quarantined(tmp_path / "run", second)) == 2
    assert sorted(second.manifest["inputs"].values()) == [f"day-{number}.parquet" for number in range(3)]
    assert second.manifest["first_event_ts"] < "2019-05-01T00:02"
    assert second.manifest["watermark"].startswith("2019-05-03")


def test_increments_over_days_hold_the_rows_of_one_import(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "days", tmp_path / "log")
    for number in range(4):
        write_day(tmp_path / "log", number)
        version = import_events.run(settings, since_last=True)
    whole = import_events.run(settings_of(tmp_path / "whole", tmp_path / "log"))
    assert rows_of(version) == rows_of(whole)
    counts = ("num_rows", "num_quarantined", "first_event_ts", "watermark", "inputs")
    assert [version.manifest[name] for name in counts] == [whole.manifest[name] for name in counts]


def test_a_file_that_changed_or_other_settings_refuse_an_increment(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "run", tmp_path / "log")
    write_day(tmp_path / "log", 0)
    import_events.run(settings)
    with pytest.raises(UserError, match=r"import_events.time_unit: .*imported with None, not 's'.*--since-last"):
        import_events.run(settings_of(tmp_path / "run", tmp_path / "log", time_unit="s"), since_last=True)
    write_day(tmp_path / "log", 0, price=[0.0] * 20)
    with pytest.raises(UserError, match=r"day-0.parquet: has changed since version .*without --since-last"):
        import_events.run(settings, since_last=True)


def test_a_folder_a_day_is_told_apart_by_its_path_and_a_file_that_changed_there_is_refused(tmp_path: Path) -> None:
    folders = [tmp_path / f"d{number}" for number in range(3)]
    for number, folder in enumerate(folders):
        write_day(folder, number).rename(folder / "part-0.parquet")
    for folder in [*folders, *folders]:
        version = import_events.run(settings_of(tmp_path / "run", folder), since_last=True)
    assert version.manifest["num_rows"] == 60
    names = ["part-0.parquet", *(f"{folder}/part-0.parquet" for folder in folders[1:])]
    assert sorted(version.manifest["inputs"].values()) == sorted(names)
    whole = import_events.run(settings_of(tmp_path / "whole", f"{tmp_path}/d*/*"))
    assert rows_of(version) == rows_of(whole)
    for folder in folders:
        write_day(folder, 7).rename(folder / "part-0.parquet")
        with pytest.raises(UserError, match=r"part-0.parquet: has changed since version"):
            import_events.run(settings_of(tmp_path / "run", folder), since_last=True)


def test_how_much_fits_into_memory_changes_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longer.datasets.readers._BATCH_ROWS", 7)
    for number in range(2):
        write_day(tmp_path / "log", number, user_id=[None] * 3 + [1] * 17)
    whole = import_events.run(settings_of(tmp_path / "whole", tmp_path / "log"))
    monkeypatch.setattr(days, "_RUN_BYTES", 1)
    runs = import_events.run(settings_of(tmp_path / "runs", tmp_path / "log"))
    assert [file.path for file in runs.data_files()] == [file.path for file in whole.data_files()]
    assert rows_of(runs) == rows_of(whole)
    assert runs.manifest["reasons"] == whole.manifest["reasons"] == {"null user_id": 6}
