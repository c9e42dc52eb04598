"""Files are read in bounded batches, whole or in stretches, and the stretches add up to the file."""

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.datasets import readers, source
from longer.datasets.generic import Generic
from longer.datasets.readers import FileError, boundaries, parquet_batches, text_batches
from longer.datasets.source import find_files, log_parts

COLUMNS = {"user_id": "u", "item_id": "i"}


def rows_of(path: Path, start: int = 0, stop: int | None = None) -> list[dict]:
    return [row for batch in text_batches(str(path), COLUMNS, start=start, stop=stop) for row in batch.to_pylist()]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.text("abc\u00e9", max_size=6)), max_size=40),
    st.integers(1, 60),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_stretches_of_any_size_give_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list, stretch: int, end: str, ends_with_newline: bool
) -> None:
    path = tmp_path_factory.mktemp("text") / "log.csv"
    text = end.join(["u,i", *(f"{u},{i}" for u, i in rows)]) + (end if ends_with_newline else "")
    path.write_bytes(text.encode())
    edges = boundaries(str(path), path.stat().st_size, stretch)
    spans = zip([0, *edges], [*edges, None], strict=True)
    assert [row for start, stop in spans for row in rows_of(path, start, stop)] == rows_of(path)
    assert [row["user_id"] for row in rows_of(path)] == [str(u) for u, _ in rows]


def test_row_groups_of_a_large_parquet_file_are_stretches_that_add_up(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    noise = np.random.default_rng(0).integers(0, 2**40, 10_000)
    pq.write_table(pa.table({"u": noise, "i": noise}), path, row_group_size=500)
    edges = boundaries(str(path), path.stat().st_size, path.stat().st_size // 4)
    assert len(edges) == 3
    spans = zip([0, *edges], [*edges, None], strict=True)
    read = [batch for start, stop in spans for batch in parquet_batches(str(path), COLUMNS, start, stop)]
    assert pa.concat_tables(read)["user_id"].to_pylist() == noise.tolist()


def test_large_files_become_several_parts_with_one_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.csv").write_text("u,i\n" + "1,2\n" * 100)
    monkeypatch.setattr(source, "_STRETCH_BYTES", 100)
    parts = log_parts(str(tmp_path), ["*.csv"])
    assert [part.number for part in parts] == [0, 1, 2, 3, 4]
    assert len({part.content_id for part in parts}) == 1
    assert sum(len(rows_of(tmp_path / "log.csv", part.start, part.stop)) for part in parts) == 100


def test_a_line_with_another_number_of_fields_keeps_its_text_and_harms_no_other(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("u,i\n1,2\n3\n4,5,6\n7,8\n")
    (batch,) = text_batches(f"{tmp_path}/log.csv", COLUMNS)
    assert batch["user_id"].to_pylist() == ["1", "7", None, None]
    assert batch["line"].to_pylist() == [None, None, "3", "4,5,6"]
    assert batch["reason"].to_pylist() == [None, None, "not 2 fields", "not 2 fields"]
    (tmp_path / "torn.csv").write_text("u,i\n3\n4,5,6\n")
    assert [row["line"] for row in rows_of(tmp_path / "torn.csv")] == ["3", "4,5,6"]


def test_a_quote_that_is_not_closed_swallows_no_row_but_its_own(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("u,i\n" + "1,2\n" * 1_999 + '7,"v\n' + "1,2\n" * 1_999)
    rows = rows_of(path)
    assert len(rows) == 3_999
    assert [row for row in rows if row["user_id"] is None] == [
        {"user_id": None, "item_id": None, "line": '7,"v', "reason": "a quote is not closed in the line"}
    ]
    tabs = tmp_path / "log.tsv"
    tabs.write_text('u\ti\n1\t"view\n2\tview\n3\tview\n4\t"view\n5\ta "view"\n')
    (batch,) = text_batches(str(tabs), COLUMNS, delimiter="\t")
    assert batch["user_id"].to_pylist() == ["2", "3", "5", None, None]
    assert batch["item_id"].to_pylist() == ["view", "view", 'a "view"', None, None]


@settings(max_examples=300, deadline=None)
@given(st.text('a,"\r\n', max_size=60), st.integers(1, 20))
def test_every_line_is_one_row_whatever_quotes_it_has_and_wherever_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, body: str, stretch: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "log.csv"
    path.write_bytes(b"u,i\n" + body.encode())
    edges = boundaries(str(path), path.stat().st_size, stretch)
    spans = list(zip([0, *edges], [*edges, None], strict=True))
    whole = rows_of(path)
    in_stretches = [row for start, end in spans for row in rows_of(path, start, end)]
    assert Counter(row["item_id"] for row in in_stretches) == Counter(row["item_id"] for row in whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_READ_BYTES", 64)
        assert Counter(row["item_id"] for row in rows_of(path)) == Counter(row["item_id"] for row in whole)
    lines = [line for line in body.encode().split(b"\n") if line not in (b"", b"\r")]
    assert len(whole) == len(lines)


def test_empty_files_and_files_of_only_a_header_have_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("u,i\n")
    pq.write_table(pa.table({"u": pa.array([], pa.int64()), "i": pa.array([], pa.int64())}), tmp_path / "e.parquet")
    assert rows_of(tmp_path / "empty.csv") == []
    assert rows_of(tmp_path / "header.csv") == []
    assert sum(len(batch) for batch in parquet_batches(f"{tmp_path}/e.parquet", COLUMNS)) == 0


def test_byte_order_marks_quotes_and_compression_are_understood(tmp_path: Path) -> None:
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress('\ufeff"u",x,i\r\n"1","a,b",2\r\n'.encode()))
    assert rows_of(tmp_path / "log.csv.gz") == [{"user_id": "1", "item_id": "2"}]


def test_a_log_of_ones_own_is_what_its_endings_say_in_any_case_and_the_rest_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "b.CSV").write_text("u,i\n1,2\n")
    (tmp_path / "d.tsv.Gz").write_bytes(gzip.compress(b"u\ti\n1\t2\n"))
    others = ["a.csv.bak", "a.csv.old", "a.csv.part", "a.csv.tmp", "a.csv.zip", "c.txt"]
    for name in others:
        (tmp_path / name).write_text("u,i\n3,4\n")
    log = Generic(COLUMNS | {"action": None}, section="import_impressions")
    parts = log.locate(str(tmp_path))
    assert [part.name for part in parts] == ["b.CSV", "d.tsv.Gz"]
    told = capsys.readouterr().err
    assert f"6 files ({', '.join(others[:5])}, ...)" in told
    assert "import_impressions" in told
    rows = [row for part in parts for batch in log.read(part, ["user_id", "item_id"]) for row in batch.to_pylist()]
    assert rows == [{"user_id": "1", "item_id": "2", "action": "event"}] * 2


def test_each_file_that_cannot_be_read_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "no.csv").write_text("u,x\n1,2\n")
    (tmp_path / "semi.csv").write_text("u;i\n1;2\n")
    (tmp_path / "two.csv").write_text("u,i,i\n1,2,3\n")
    (tmp_path / "cr.csv").write_bytes(b"u,i\r1,2\r3,4\r")
    (tmp_path / "long.csv").write_bytes(b"u,i\n" + b"x" * (20 << 20))
    (tmp_path / "latin.csv").write_bytes("u,i\n1,caf\u00e9\n".encode("latin-1"))
    for name, problem in {
        "no.csv": "no column 'i' \\(it has u, x\\): map 'item_id' in the import's columns$",
        "semi.csv": "no column 'u' \\(it has u;i, cut at commas, or in a .tsv file at tabs\\)",
        "two.csv": "two columns are named 'i'",
        "latin.csv": "not a readable text file .*UTF8",
        "cr.csv": "its lines end in carriage returns alone",
        "long.csv": "a line is longer than",
    }.items():
        with pytest.raises(FileError, match=f"{name}: {problem}"):
            rows_of(tmp_path / name)
    pq.write_table(pa.table({"u": range(1000), "i": range(1000)}), tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-100])
    with pytest.raises(FileError, match=r"cut.parquet: not a readable Parquet file"):
        list(parquet_batches(f"{tmp_path}/cut.parquet", COLUMNS))


def test_a_folder_a_glob_and_one_file_name_their_files_and_leave_hidden_ones_out(tmp_path: Path) -> None:
    for name in ("dt=1/a.csv", "dt=2/a.csv", ".tmp/a.csv", "dt=1/_SUCCESS.csv", "dt=1/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [file.name for file in find_files(str(tmp_path), ["*.csv"])] == ["dt=1/a.csv", "dt=2/a.csv"]
    assert [file.name for file in find_files(f"{tmp_path}/dt=*/*.csv", ["*.csv"])] == ["dt=1/a.csv", "dt=2/a.csv"]
    assert [file.name for file in find_files(f"{tmp_path}/dt=2/a.csv", ["*.csv"])] == ["a.csv"]
    assert len({file.content_id for file in find_files(str(tmp_path), ["*.csv"])}) == 2
