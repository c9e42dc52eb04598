"""A table that cannot be read costs nobody more than it has to, and is tried again soon."""

import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from longer.config import Settings
from longer.errors import StorageError
from longer.serving import reads
from longer.serving.history import HistorySource
from longer.serving.pending import Pending, pending_users
from longer.serving.reads import Breaker, TableReads
from longer.storage import Table
from tests.serving.tables import NUM_USERS, build_world


@pytest.fixture
def world(tmp_path: Path) -> Settings:
    return build_world(tmp_path)


def history_of(world: Settings) -> HistorySource:
    return HistorySource(world.path("tables", "sequences"), world.event_schema)


def users(*ids: int) -> list[Pending]:
    return pending_users(pa.array(ids or range(1, NUM_USERS + 1)))


def test_a_bucket_that_fails_is_left_alone_for_a_second_and_then_one_read_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s, breaker = 100.0, Breaker()
    monkeypatch.setattr(reads.time, "monotonic", lambda: now_s)
    assert breaker.admits(0)
    breaker.failed(0)
    assert [breaker.admits(0), breaker.admits(1)] == [False, True]
    breaker.succeeded(1)
    now_s = 101.5
    assert [breaker.admits(0) for _ in range(3)] == [True, False, False]
    breaker.failed(0)
    assert not breaker.admits(0)
    now_s = 103.0
    assert breaker.admits(0)
    breaker.succeeded(0)
    assert [breaker.admits(0) for _ in range(3)] == [True] * 3


def test_when_two_buckets_in_a_row_fail_all_are_left_alone_until_any_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, breaker = 100.0, Breaker()
    monkeypatch.setattr(reads.time, "monotonic", lambda: now_s)
    for bucket in (0, 1):
        assert breaker.admits(bucket)
        breaker.failed(bucket)
    assert not breaker.admits(2)
    now_s = 101.5
    assert [breaker.admits(bucket) for bucket in (2, 3, 2)] == [True, False, False]
    breaker.succeeded(2)
    assert [breaker.admits(bucket) for bucket in (3, 2, 0, 0)] == [True, True, True, False]


def test_users_of_a_damaged_bucket_are_told_and_others_are_read(world: Settings) -> None:
    damaged = Path(Table(world.path("tables", "sequences")).require("jobs.build_sequences").files()[0])
    content = bytearray(damaged.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)  # the footer stays whole
    damaged.write_bytes(content)
    table = TableReads(history_of(world), 10)
    for word in (str(damaged), "left alone"):
        asked = users()
        for read in table.start(asked):
            read.result(timeout=10)
        failed = [one for one in asked if one.error]
        assert 0 < len(failed) < len(asked)
        assert all(isinstance(one.error, StorageError) and word in str(one.error) for one in failed)
        assert all(one.row and one.row.history.num_events for one in asked if not one.error)


def test_while_nothing_comes_back_only_so_many_wait_and_buckets_do_not_wait_for_each_other(
    world: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, goes_on, began = history_of(world), threading.Event(), threading.Semaphore(0)
    read = history.read

    def silent_for_a_while(user_ids: pa.Array) -> list:
        began.release()
        assert goes_on.wait(10)
        return read(user_ids)

    monkeypatch.setattr(history, "read", silent_for_a_while)
    table, asked = TableReads(history, NUM_USERS), users()
    waiting = table.start(asked)
    num_buckets = len(set(waiting))
    assert num_buckets > 1
    for _ in range(num_buckets):
        assert began.acquire(timeout=10)  # all at once
    time.sleep(reads._SILENCE_S + 0.05)
    late = users(1)
    table.start(late)[0].result(timeout=0)
    assert isinstance(late[0].error, StorageError)
    goes_on.set()
    for one in waiting:
        one.result(timeout=10)
    assert [one.row.history.end_index for one in asked if one.row] == [n * n for n in range(1, 10)]
    again = users(1)
    table.start(again)[0].result(timeout=10)
    assert again[0].row
