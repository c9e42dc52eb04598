"""A table never shows half a version, on disk and on S3."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import longer
from longer.errors import UserError
from longer.files import filesystem, read_bytes, write_bytes
from longer.storage import TABLE_FORMAT, Table, checked_output, fingerprint


def publish(table: Table, version_id: str, content: bytes) -> None:
    with checked_output(table.begin(version_id), "bucket=0000/part-0.parquet") as sink:
        sink.write(content)
    table.publish(version_id, {"num_rows": 1}, [sink.data_file])


def test_a_crash_between_data_and_manifest_leaves_the_last_version_served(tmp_path: Path) -> None:
    table = Table(f"{tmp_path}/events")
    publish(table, "first", b"old")
    with checked_output(table.begin("second"), "bucket=0000/part-0.parquet") as sink:
        sink.write(b"new")
    current = table.current()
    assert current is not None
    assert (current.id, table.find("second")) == ("first", None)


def test_a_crash_between_manifest_and_pointer_leaves_the_last_version_served(tmp_path: Path) -> None:
    table = Table(f"{tmp_path}/events")
    publish(table, "first", b"old")
    manifest = {"table_format": TABLE_FORMAT, "files": []}
    write_bytes(f"{tmp_path}/events/second/_MANIFEST.json", json.dumps(manifest).encode())
    assert table.require("jobs.import_events").id == "first"
    reused = table.reuse("second")
    assert reused is not None
    assert table.require("jobs.import_events").id == "second"


def test_what_an_unfinished_attempt_left_is_not_published(tmp_path: Path) -> None:
    table = Table(f"{tmp_path}/events")
    write_bytes(f"{table.begin('v')}/stale.parquet", b"stale")
    write_bytes(f"{table.begin('v')}/fresh.parquet", b"fresh")
    assert table.publish("v", {}).files() == [f"{tmp_path}/events/v/fresh.parquet"]


def test_a_file_shared_with_an_earlier_version_is_found_there_and_missed_when_gone(tmp_path: Path) -> None:
    table = Table(f"{tmp_path}/sequences")
    with checked_output(table.begin("v1"), "bucket=0/part-0.parquet") as sink:
        sink.write(b"old")
    first = table.publish("v1", {}, [sink.data_file])
    with checked_output(table.begin("v2"), "bucket=1/part-0.parquet") as sink:
        sink.write(b"new")
    second = table.publish("v2", {}, [*first.data_files(), sink.data_file])
    assert second.files() == [
        f"{tmp_path}/sequences/v1/bucket=0/part-0.parquet",
        f"{tmp_path}/sequences/v2/bucket=1/part-0.parquet",
    ]
    assert second.files("bucket=1/") == [f"{tmp_path}/sequences/v2/bucket=1/part-0.parquet"]
    assert table.reuse("v2") is not None
    os.remove(first.files()[0])
    assert table.reuse("v2") is None


def test_a_version_of_another_table_format_is_built_anew_not_misread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(f"{tmp_path}/events")
    table.begin("v")
    table.publish("v", {}, [])
    monkeypatch.setattr("longer.storage.TABLE_FORMAT", -1)
    assert table.find("v") is None
    assert table.current() is None
    assert table.reuse("v") is None


def test_checksums_are_the_same_written_or_read_back(tmp_path: Path) -> None:
    table = Table(f"{tmp_path}/events")
    with checked_output(table.begin("v"), "a/b.parquet") as sink:
        sink.write(b"some bytes")
    written = table.publish("v", {}, [sink.data_file]).manifest["files"]
    assert written == table.publish("v", {}).manifest["files"]
    digest = hashlib.sha256(b"some bytes").hexdigest()
    assert written == [{"path": "a/b.parquet", "num_bytes": 10, "sha256": digest, "version": "v"}]


def test_a_table_that_was_never_built_names_itself_and_the_job(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sequences: .*python -m jobs.build_sequences"):
        Table(f"{tmp_path}/sequences").require("jobs.build_sequences")


def test_a_failed_small_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(f"{tmp_path}/pointer.json", b"old")

    def no_space(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_bytes(f"{tmp_path}/pointer.json", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_small_write_that_cannot_begin_tells_its_own_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that the file it did not make cannot be removed, which callers take for a file that is not there."""

    def refused(*_: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(PermissionError, match="not yours"):
        write_bytes(f"{tmp_path}/name", b"new")


def test_fingerprints_do_not_depend_on_dictionary_order_and_stay_the_same_for_ever() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) == "260e4ee6b948"
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_an_unknown_scheme_is_one_line() -> None:
    with pytest.raises(UserError, match="local or start with s3://"):
        filesystem("gs://bucket/table")


def test_a_second_writer_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    """Two runs of one job: the later one must not clear what the earlier one is writing.

    Two machines that mount a disk have nothing else in common, and may mount it at other paths.
    """
    table = Table(str(tmp_path / "table"))
    write_bytes(f"{table.begin('v1')}/part-0.bin", b"data")
    (tmp_path / "tmp_of_another_machine").mkdir()
    (tmp_path / "mounted_elsewhere").symlink_to(tmp_path)
    there = {"TMPDIR": str(tmp_path / "tmp_of_another_machine"), "PYTHONPATH": str(Path(longer.__file__).parents[1])}
    for attempt in ("begin('v1')", "resume('v1')", "clear()"):
        second = f"from longer.storage import Table; import sys; Table(sys.argv[1]).{attempt}"
        done = subprocess.run(
            [sys.executable, "-c", second, str(tmp_path / "mounted_elsewhere/table")],
            env=os.environ | there,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "another run is writing this table" in done.stderr
    version = table.publish("v1", {})
    assert read_bytes(version.files()[0]) == b"data"
    with pytest.raises(UserError, match="another run has just published version v1"):
        Table(table.path).begin("v1")


def test_a_disk_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with pytest.raises(
        UserError, match=r"\.table\.lock: cannot be locked \(No locks available\): choose another --root"
    ):
        Table(str(tmp_path / "table")).begin("v1")


def test_a_version_that_lost_a_file_is_built_again_not_served(tmp_path: Path) -> None:
    table = Table(str(tmp_path / "table"))
    write_bytes(f"{table.begin('v1')}/part-0.bin", b"data")
    version = table.publish("v1", {})
    os.remove(version.files()[0])
    assert table.reuse("v1") is None
    write_bytes(f"{table.begin('v1')}/part-0.bin", b"data")
    table.publish("v1", {})
    assert table.reuse("v1") is not None


def test_a_damaged_pointer_is_named(tmp_path: Path) -> None:
    write_bytes(str(tmp_path / "table" / "_CURRENT.json"), b"{")
    with pytest.raises(UserError, match=r"_CURRENT.json: damaged"):
        Table(str(tmp_path / "table")).current()
