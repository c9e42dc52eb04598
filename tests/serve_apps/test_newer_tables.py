"""What a replica does by itself when the tables have moved, without Serve."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longer.errors import StorageError
from longer.serving.history import TableRow
from longer.serving.scorer import Scorer
from serve_apps import newer_tables
from serve_apps.newer_tables import NewerTables
from tests.serving.tables import DAY_MS, NUM_USERS, build_world
from tests.serving.test_scorer import END_MS, ask, publish_more, scorer_of

ASKED = [(user, END_MS + DAY_MS) for user in range(1, NUM_USERS + 1)]


async def in_worker(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@pytest.fixture
def scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scorer:
    """Holds all users, of whom one has done something since."""
    monkeypatch.setattr(newer_tables, "_READ_TOGETHER", 5)
    world = build_world(tmp_path)
    scorer = scorer_of(world)
    ask(scorer, *ASKED)
    publish_more(world, [(6, END_MS)])
    return scorer


def test_all_who_are_held_are_hits_without_a_read_once_they_have_been_looked_at_again(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = NewerTables(scorer, in_worker)

    async def refresh() -> None:
        await tables.move()
        await tables.look_again()

    asyncio.run(refresh())
    monkeypatch.setattr(scorer.history, "read", lambda *_: pytest.fail("read the table"))
    results = ask(scorer, *ASKED)
    assert [result.source for result in results] == ["hit"] * NUM_USERS
    assert [result.num_events for result in results] == [n * n + (n == 6) for n in range(1, NUM_USERS + 1)]
    asyncio.run(tables.look_again())  # there is nothing to do


def test_a_damaged_bucket_leaves_its_own_users_until_they_ask_and_a_silent_table_all_of_them_for_the_next_time(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, history = NewerTables(scorer, in_worker), scorer.history
    read, one = history.read, set(history.buckets([scorer.user_key(9)]))
    asyncio.run(tables.move())
    damaged = set(history.buckets([scorer.user_key(user) for user, _ in ASKED]))

    def fails(user_ids: Any) -> list[TableRow]:
        if damaged & set(history.buckets([scorer.user_key(user_ids[0].as_py())])):
            raise StorageError("cannot be read")
        return read(user_ids)

    monkeypatch.setattr(history, "read", fails)
    asyncio.run(tables.look_again())
    assert len(scorer.held_of_other_tables()) == NUM_USERS
    damaged = one
    asyncio.run(tables.look_again())
    left = scorer.held_of_other_tables().to_pylist()
    assert set(history.buckets([scorer.user_key(user) for user in left])) == one
