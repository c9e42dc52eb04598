"""The store fails in every way that stores do: what retries cure is not noticed, what they do not is one line."""

import socket
import subprocess
import sys
import time

import pytest

from longer import s3 as longer_s3
from longer.datasets.source import find_files
from longer.errors import StorageError
from longer.files import checksum, exists, file_sizes, open_input, read_bytes, write_bytes
from longer.storage import Table, checked_output
from tests.s3.proxy import Fault, Plan, Proxy, Request

DATA = bytes(range(256)) * 4096


@pytest.fixture
def faulty(faulty_s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    monkeypatch.setitem(longer_s3.CONFIG, "read_timeout", 1)
    return faulty_s3


def first(method: str, num_requests: int, fault: Fault) -> Plan:
    """A plan that fails the first requests of a method."""
    left = [num_requests]

    def plan(request: Request) -> Fault | None:
        if request.method != method or not left[0]:
            return None
        left[0] -= 1
        return fault

    return plan


FAULTS = {
    "500": Fault(status=500),
    "503": Fault(status=503),
    "a body cut in the middle": Fault(cut=True),
    "silence before the answer": Fault(delay_s=1.5),
    "silence in the middle of a body": Fault(stall_s=1.5),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_read_outlives(faulty: Proxy, name: str) -> None:
    write_bytes("s3://tables/run/object", DATA)
    faulty.plan = first("GET", 2, FAULTS[name])
    assert read_bytes("s3://tables/run/object") == DATA
    assert faulty.num_faults == 2
    faulty.plan = first("GET", 2, FAULTS[name])
    assert len(checksum("s3://tables/run/object")) == 64
    assert faulty.num_faults == 4


@pytest.mark.parametrize("name", ["500", "503", "silence before the answer"])
def test_a_write_outlives(faulty: Proxy, name: str) -> None:
    table = Table("s3://tables/run/table")
    faulty.plan = first("PUT", 2, FAULTS[name])
    with checked_output(table.begin("v1"), "part-0.bin") as sink:
        sink.write(DATA)
    table.publish("v1", {}, [sink.data_file])
    assert faulty.num_faults == 2
    assert read_bytes("s3://tables/run/table/v1/part-0.bin") == DATA
    version = table.current()
    assert version is not None
    assert checksum(version.files()[0]) == version.data_files()[0].sha256


def test_a_store_that_keeps_failing_is_one_line_that_names_the_object(
    faulty: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(longer_s3.CONFIG["retries"], "total_max_attempts", 3)  # type: ignore[arg-type]
    faulty.plan = lambda request: Fault(status=500)
    with pytest.raises(StorageError, match=r"^s3://tables/run/object: .*: check AWS_ENDPOINT_URL") as caught:
        exists("s3://tables/run/object")
    assert "\n" not in str(caught.value)


def test_bodies_cut_on_every_try_are_one_line_that_names_the_object(faulty: Proxy) -> None:
    write_bytes("s3://tables/run/object", DATA)
    faulty.plan = lambda request: Fault(cut=True) if request.method == "GET" else None
    for read in (read_bytes, checksum, lambda path: open_input(path, len(DATA)).read()):
        num_faults = faulty.num_faults
        with pytest.raises(
            StorageError, match=r"^s3://tables/run/object: the answer broke off \(.+\): check"
        ) as caught:
            read("s3://tables/run/object")
        assert "\n" not in str(caught.value)
        assert faulty.num_faults == num_faults + 5


def test_a_silent_store_is_asked_as_often_as_the_settings_say_and_no_more(
    faulty: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(longer_s3.CONFIG["retries"], "total_max_attempts", 2)  # type: ignore[arg-type]
    faulty.plan = lambda request: Fault(delay_s=1.5)
    for attempt in (exists, read_bytes, lambda path: find_files(path, ["*"])):
        num_faults = faulty.num_faults
        with pytest.raises(StorageError, match=r"^s3://tables/log: .*timeout"):
            attempt("s3://tables/log")
        assert faulty.num_faults == num_faults + 2


def test_an_endpoint_without_a_scheme_and_an_impossible_bucket_are_one_line_each(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt in (exists, read_bytes, lambda path: find_files(path, ["*"])):
        with pytest.raises(StorageError, match=r"^s3://Bad_Bucket!.*Invalid bucket name") as caught:
            attempt("s3://Bad_Bucket!/x")
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    longer_s3.S3.clear_instance_cache()
    for attempt in (exists, read_bytes, lambda path: find_files(path, ["*"])):
        with pytest.raises(
            StorageError, match=r"^AWS_ENDPOINT_URL: Invalid endpoint: localhost:9000: write it as http"
        ):
            attempt("s3://tables/x")


def test_a_bucket_that_is_not_there_and_refused_credentials_are_one_line_each(faulty: Proxy) -> None:
    for attempt in (lambda: Table("s3://nowhere/t").current(), lambda: write_bytes("s3://nowhere/t", b"x")):
        with pytest.raises(StorageError, match=r"^s3://nowhere.*bucket does not exist"):
            attempt()
    faulty.plan = lambda request: Fault(status=403)
    with pytest.raises(StorageError, match=r"^s3://tables/object: "):
        read_bytes("s3://tables/object")


def test_an_object_that_is_not_there_is_no_failure_of_the_store(faulty: Proxy) -> None:
    assert not exists("s3://tables/none")
    assert Table("s3://tables/none").current() is None
    with pytest.raises(FileNotFoundError):
        read_bytes("s3://tables/none")


def test_a_file_written_while_an_empty_folder_is_listed_makes_no_file_of_the_folder(faulty: Proxy) -> None:
    asked: list[str] = []

    def written_after_the_first_answer(request: Request) -> None:
        if request.method in ("GET", "HEAD"):
            asked.append(request.path)
            if len(asked) == 2:
                write_bytes("s3://tables/run/marks/0001/actor", b"")

    faulty.plan = written_after_the_first_answer
    assert file_sizes("s3://tables/run/marks") == {}
    assert len(asked) > 1, "the listing was one request: nothing could come between"
    assert file_sizes("s3://tables/run/marks") == {"0001/actor": 0}


def test_an_endpoint_that_is_down_is_one_line_and_exit_code_2(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
    started = time.perf_counter()
    command = [sys.executable, "-m", "jobs.import_events", "--root", "s3://tables/run", "--import_events.source"]
    done = subprocess.run([*command, "s3://tables/source"], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("s3://tables/source/transactions.parquet: ")
    assert time.perf_counter() - started < 90
