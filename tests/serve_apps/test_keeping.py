"""What a replica brings back by itself, without Serve: whoever was forgotten stays so until she asks."""

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longer.config import Settings
from longer.ring import Ring, session_of
from longer.serving import dumps, forgotten
from longer.serving.scorer import EventsRequest, Scorer, ScoreRequest
from serve_apps import keeping
from serve_apps.arguments import ScoringArgs
from serve_apps.keeping import StateKeeper
from tests.serving.tables import START_MS, build_world, checkpoint_path
from tests.serving.test_dumps import scorer_of


async def in_worker(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@pytest.mark.parametrize("has_dumps", [True, False])
def test_warm_up_makes_no_state_of_a_forgotten_user_before_she_asks(has_dumps: bool, tmp_path: Path) -> None:
    world = build_world(tmp_path / "world")
    scorer = scorer_of(world, device_states=9)
    args = ScoringArgs(
        checkpoint=checkpoint_path(world),
        sequences=world.path("tables", "sequences"),
        warm_users=3,
        host_cache_bytes=1 << 20,
        state_dump=str(tmp_path / "dumps") if has_dumps else None,
    )
    keeper, gone = StateKeeper(args, scorer, "me", in_worker), scorer.user_key(9)

    def is_held() -> bool:
        return scorer.cache.peek(gone, scorer.version) is not None

    async def come_and_go() -> None:
        await keeper.bring(Ring(["me"]))
        assert is_held()  # one of the most active
        await keeper.mark_forgotten(9)
        assert keeper.forget(9)
        await keeper.bring(Ring(["me", "other"]))
        await keeper.bring(Ring(["me"]))
        assert not is_held()

    asyncio.run(come_and_go())
    scorer.score([ScoreRequest(9, ["item1"], request_ts=START_MS + 10**10)])
    assert is_held()


def test_warm_up_makes_no_state_of_a_user_whom_another_replica_has_marked_as_forgotten(tmp_path: Path) -> None:
    """A replica that starts was not there when she was forgotten."""
    world = build_world(tmp_path / "world")
    asked = {"checkpoint": checkpoint_path(world), "sequences": world.path("tables", "sequences"), "warm_users": 3}
    args = ScoringArgs(**asked, host_cache_bytes=1 << 20, state_dump=str(tmp_path / "dumps"))
    (other, _), scorer = keeper_of(world, tmp_path / "dumps", "other"), scorer_of(world, device_states=9)
    keeper = StateKeeper(args, scorer, "me", in_worker)

    async def run() -> None:
        await other.mark_forgotten(9)
        await keeper.bring(Ring(["me"]))

    asyncio.run(run())
    held = [user for user in range(1, 10) if scorer.cache.peek(scorer.user_key(user), scorer.version)]
    assert held == [7, 8]  # of the three most active


def test_what_is_remembered_of_forgotten_users_is_bounded_and_past_it_nobody_is_brought_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may ask for any id to be forgotten, and what is not remembered might be warmed again."""
    monkeypatch.setattr(keeping, "_MOST_FORGOTTEN", 3)
    world = build_world(tmp_path / "world")
    asked = {"checkpoint": checkpoint_path(world), "sequences": world.path("tables", "sequences")}
    for warm_users, num_remembered in ((0, 0), (3, 3)):
        scorer = scorer_of(world, device_states=9)
        keeper = StateKeeper(ScoringArgs(**asked, warm_users=warm_users), scorer, "me", in_worker)
        for user in range(100, 110):
            keeper.forget(user)
        assert len(keeper._forgotten) == num_remembered
        asyncio.run(keeper.bring(Ring(["me"])))
        assert (len(scorer.cache), keeper.num_warmed) == (0, 0)


def keeper_of(world: Settings, folder: Path, name: str) -> tuple[StateKeeper, Scorer]:
    args = ScoringArgs(
        checkpoint=checkpoint_path(world),
        sequences=world.path("tables", "sequences"),
        host_cache_bytes=1 << 20,
        state_dump=str(folder),
    )
    scorer = scorer_of(world, device_states=9)
    return StateKeeper(args, scorer, name, in_worker), scorer


def one_leaves_and_one_stays(tmp_path: Path) -> tuple[Path, tuple[StateKeeper, Scorer], tuple[StateKeeper, Scorer]]:
    """Where dumps lie, and two replicas of one world, each with its scorer: `before` and `me`."""
    world, folder = build_world(tmp_path / "world"), tmp_path / "dumps"
    return folder, keeper_of(world, folder, "before"), keeper_of(world, folder, "me")


def test_what_was_sent_to_a_replica_that_stopped_is_known_to_the_one_whose_users_they_are(tmp_path: Path) -> None:
    """But for a user who was forgotten there by a call that left no mark yet."""
    world, folder, users = build_world(tmp_path / "world"), tmp_path / "dumps", range(1, 10)
    before, sender = keeper_of(world, folder, "before")
    (keeper, scorer), (other, others) = keeper_of(world, folder, "me"), keeper_of(world, folder, "other")
    sender.add_events([EventsRequest(user, {"item_id": ["item2"], "event_ts": [START_MS]}) for user in users])
    ring = Ring(["me", "other"])
    own = {user for user in users if ring.owner(session_of(user)) == "me"}

    async def run() -> None:
        await before.leave()
        await keeper.bring(ring)
        assert {user for user in users if scorer.online.revision(scorer.user_key(user))} == own
        other.forget(7)
        other.forget(8)
        await other.bring(Ring(["other"]))

    asyncio.run(run())
    assert 0 < len(own) < 9
    assert before.counters["dumped_event_users"] == 9
    assert others.online.counters.restored == 7


def test_what_was_read_of_dumps_and_models_that_are_gone_is_not_remembered(tmp_path: Path) -> None:
    folder, (leaving, before), (keeper, _) = one_leaves_and_one_stays(tmp_path)
    before.score([ScoreRequest(user, ["item1"], request_ts=START_MS + 10**10) for user in (4, 5, 6)])

    async def run() -> None:
        await leaving.leave()
        await keeper.bring(Ring(["me"]))
        assert (len(keeper._read), keeper.counters["restored"]) == (3, 3)
        shutil.rmtree(folder / "before")
        await keeper.bring(Ring(["me"]))
        assert keeper._read == set()

    asyncio.run(run())


@pytest.mark.parametrize("is_full", [False, True])
def test_the_bytes_of_a_forgotten_user_do_not_stay_in_a_dump_until_the_next_replica_stops(
    is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dump holds her events as they were sent, and a service may run for months, and have brought back all that it may."""
    folder, (leaving, before), (keeper, scorer) = one_leaves_and_one_stays(tmp_path)
    answered(before, 4, 5)
    if is_full:
        monkeypatch.setattr(keeping, "_MOST_FORGOTTEN", 1)
        keeper.forget(100)
    clock_s = [1000.0]
    monkeypatch.setattr(keeping, "monotonic", lambda: clock_s[0])
    monkeypatch.setattr(time, "monotonic", lambda: clock_s[0])

    async def run() -> None:
        await leaving.leave()
        await keeper.bring(Ring(["me"]))
        await keeper.mark_forgotten(4)
        keeper.forget(4)
        for _ in range(13):
            clock_s[0] += 60
            await keeper.bring(Ring(["me"]))

    asyncio.run(run())
    assert [path.name for path in folder.iterdir()] == ["forgotten"]
    assert len(scorer.online) == (0 if is_full else 1)


def answered(before: Scorer, *users: int) -> None:
    before.score([ScoreRequest(user, ["item1"], request_ts=START_MS + 10**10) for user in users])
    before.add_events([EventsRequest(user, {"item_id": ["item2"], "event_ts": [START_MS]}) for user in users])


def test_a_user_forgotten_while_she_was_brought_back_goes_although_the_marks_could_not_be_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (leaving, before), (keeper, scorer) = one_leaves_and_one_stays(tmp_path)
    answered(before, 4, 5)
    user_keys = [scorer.user_key(user) for user in (4, 5)]

    def held() -> list[bool]:
        return [bool(scorer.cache.peek(key, scorer.version) and scorer.online.revision(key)) for key in user_keys]

    def fail() -> None:
        assert keeper._dumps
        keeper._dumps.forgotten.mark(user_keys[0])
        raise OSError("the bucket is away")

    async def run() -> None:
        await leaving.leave()
        with monkeypatch.context() as patched:
            assert keeper._dumps
            patched.setattr(keeper._dumps.forgotten, "times_s", fail)
            await keeper.bring(Ring(["me"]))
        assert held() == [True, True]
        await keeper.bring(Ring(["me"]))
        assert held() == [False, True]

    asyncio.run(run())


def test_a_file_that_went_between_listing_and_reading_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (leaving, before), (keeper, scorer) = one_leaves_and_one_stays(tmp_path)
    answered(before, 4, 5)

    def fail(path: str) -> bytes:
        if path.endswith("parquet"):
            raise FileNotFoundError(path)
        return Path(path).read_bytes()

    async def run() -> None:
        await leaving.leave()
        with monkeypatch.context() as patched:
            patched.setattr(dumps, "read_bytes", fail)
            await keeper.bring(Ring(["me"]))
        assert len(scorer.online) == 0
        await keeper.bring(Ring(["me"]))
        assert len(scorer.online) == 2
        shutil.rmtree(folder / "before")
        await keeper.bring(Ring(["me"]))
        assert keeper._brought[1] == frozenset()

    asyncio.run(run())


def test_marks_cost_a_listing_before_and_one_after_and_no_read_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (leaving, before), (keeper, _) = one_leaves_and_one_stays(tmp_path)
    answered(before, 4, 5)
    asked = list[str]()

    def counted(name: str, function: Callable[[str], Any]) -> Callable[[str], Any]:
        return lambda path: asked.append(name) or function(path)  # type: ignore[func-returns-value]

    async def run() -> None:
        await leaving.leave()
        for user in range(100, 120):
            await keeper.mark_forgotten(user)
        for module in (dumps, forgotten):
            monkeypatch.setattr(module, "file_sizes", counted("list", module.file_sizes))
        monkeypatch.setattr(dumps, "read_bytes", counted("read", dumps.read_bytes))
        await keeper.bring(Ring(["me"]))
        assert (asked.count("list"), asked.count("read")) == (2, 4)  # the JSON twice, events, states
        await keeper.bring(Ring(["me"]))
        assert (asked.count("list"), asked.count("read")) == (3, 4)

    asyncio.run(run())


def test_a_folder_of_dumps_is_not_listed_at_each_health_check_but_where_a_dump_may_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each replica asks a bucket once for every thousand files. But the events in a dump are nowhere else: none may come late."""
    (_, (leaving, before), (keeper, scorer)), clock_s = one_leaves_and_one_stays(tmp_path), [1000.0]
    answered(before, 4, 5)
    monkeypatch.setattr(keeping, "monotonic", lambda: clock_s[0])
    listed, file_sizes = list[float](), dumps.file_sizes

    def sizes(path: str) -> dict[str, int]:
        listed.append(clock_s[0])
        return file_sizes(path)

    monkeypatch.setattr(dumps, "file_sizes", sizes)

    async def check_health(ring: Ring, num_checks: int) -> int:
        listed.clear()
        for _ in range(num_checks):
            await keeper.bring(ring)
            clock_s[0] += 10
        return len(listed)

    async def run() -> None:
        both, alone = Ring(["me", "before"]), Ring(["me"])
        assert await check_health(both, 6) == 6  # it may have started because another stopped
        assert await check_health(both, 60) == 10
        assert await check_health(alone, 4) == 4
        await leaving.leave()  # ten seconds before Serve would have killed it
        assert await check_health(alone, 1) == 1
        assert len(scorer.online) == 2
        assert await check_health(alone, 60) == 10
        monkeypatch.setattr(dumps, "file_sizes", lambda _: 1 / 0)
        clock_s[0] += 60
        await check_health(alone, 1)
        monkeypatch.setattr(dumps, "file_sizes", sizes)
        assert await check_health(alone, 3) == 1  # at once after one that failed

    asyncio.run(run())
