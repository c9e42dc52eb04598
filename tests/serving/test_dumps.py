"""States that outlive their replica: what is restored scores as before, and what must not come back does not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from longer.config import Settings
from longer.model.pool import Precision
from longer.serving.dumps import StateDumps
from longer.serving.pending import pending_users
from longer.serving.scorer import Scorer, ScoreRequest, ScoreResult
from tests.serving.tables import (
    DAY_MS,
    NUM_USERS,
    START_MS,
    build_world,
    checkpoint_path,
    publish_catalogue,
    publish_random_model,
    publish_sequences,
    random_events,
)

ITEMS = ["item1", "item5", "never seen"]
END_MS = START_MS + 31 * DAY_MS
USERS = range(1, NUM_USERS + 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return build_world(tmp_path_factory.mktemp("world"))


def scorer_of(world: Settings, device_states: int = 2, precision: Precision = "float32") -> Scorer:
    """With room for so many states on the device, and for all users' in host memory."""
    scorer = Scorer(
        checkpoint_path(world),
        world.path("tables", "sequences"),
        0,
        world.path("tables", "items"),
        host_bytes=1 << 20,
        state_precision=precision,
    )
    scorer.cache.budget_bytes = device_states * scorer.cache.most_state_bytes
    return scorer


def ask(scorer: Scorer, user: int, **more: Any) -> ScoreResult:
    [result] = scorer.score([ScoreRequest(user, ITEMS, **{"request_ts": END_MS, **more})])
    assert isinstance(result, ScoreResult), result
    return result


def restore(
    dumps: StateDumps, scorer: Scorer, is_wanted: Callable[[int | str], bool] = lambda _: True
) -> list[int | str]:
    """Ids of the users taken in."""
    return [
        state.user_id
        for states in dumps.states(scorer.version, scorer.cache.layout, lambda _, user_id: is_wanted(user_id))
        for state in states
        if scorer.cache.restore(state.user_key, scorer.version, state.entry, state.words_NI, state.is_protected)
    ]


def leave(world: Settings, folder: Path, precision: Precision = "float32") -> dict[int, ScoreResult]:
    """What a replica answered all users before it left its states in the folder."""
    scorer = scorer_of(world, precision=precision)
    answers = {user: ask(scorer, user) for user in USERS}
    assert StateDumps(str(folder), "before").write(scorer.cache, scorer.version, 60) == NUM_USERS
    return answers


@pytest.fixture(scope="module")
def left(world: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("left")
    leave(world, folder)
    return folder


@pytest.fixture
def dumped(left: Path, tmp_path: Path) -> Path:
    """A folder of its own with the dump of a replica that has answered all users."""
    shutil.copytree(left, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8", "fp8"])
def test_restored_states_hit_and_score_as_they_did(world: Settings, tmp_path: Path, precision: Precision) -> None:
    before, scorer = leave(world, tmp_path, precision), scorer_of(world, precision=precision)
    dumps = StateDumps(str(tmp_path), "after")
    assert sorted(map(int, restore(dumps, scorer))) == list(USERS)
    for user in USERS:
        answer = ask(scorer, user)
        assert answer.source == "hit"
        np.testing.assert_array_equal(answer.scores["label"], before[user].scores["label"])
    assert scorer.cache.counters.promote == NUM_USERS


def test_restored_states_grow_as_those_that_never_left(world: Settings, dumped: Path) -> None:
    restored, other = scorer_of(world), scorer_of(world)
    restore(StateDumps(str(dumped), "after"), restored)
    events = {"item_id": ["item2"] * 9, "event_ts": [END_MS + n for n in range(9)], "action": ["buy"] * 9}
    events |= {"category": ["category2"] * 9, "price": [2.0] * 9, "quantity": [1.0] * 9}
    for user in USERS:
        grown = ask(restored, user, request_ts=END_MS + 20, events=events)
        assert grown.source == "append"
        anew = ask(other, user, request_ts=END_MS + 20, events=events)
        np.testing.assert_allclose(grown.scores["label"], anew.scores["label"], rtol=0, atol=1e-6)


def test_each_replica_takes_what_is_its_own_the_hottest_where_room_is_short(world: Settings, tmp_path: Path) -> None:
    scorer = scorer_of(world)
    for user in [*USERS, 4, 2]:  # both protected, and 2 used last
        ask(scorer, user)
    StateDumps(str(tmp_path), "before").write(scorer.cache, scorer.version, 60)
    dumps = StateDumps(str(tmp_path), "after")
    assert sorted(map(int, restore(dumps, scorer_of(world), lambda user: int(user) % 2 == 1))) == [1, 3, 5, 7, 9]
    small = scorer_of(world)
    small.cache.host_budget_bytes = 2 * small.cache.most_state_bytes
    assert restore(dumps, small)[:2] == [2, 4]


def test_a_state_with_events_that_the_table_never_got_is_made_anew(world: Settings, tmp_path: Path) -> None:
    """They were sent to the replica that is gone: what they left must not pass for the history that is known now."""
    scorer = scorer_of(world)
    event = {"item_id": ["item2"], "event_ts": [END_MS], "action": ["buy"], "category": ["category2"]}
    event |= {"price": [2.0], "quantity": [1.0]}
    assert ask(scorer, 5, request_ts=END_MS + 5, events=event).num_events == 26
    StateDumps(str(tmp_path), "before").write(scorer.cache, scorer.version, 60)
    after = scorer_of(world)
    ask(after, 6, events={name: values * 2 for name, values in event.items()})  # a revision as high as the other's was
    assert restore(StateDumps(str(tmp_path), "after"), after) == [5]
    answer = ask(after, 5, request_ts=END_MS + 5)
    assert (answer.source, answer.num_events, after.cache.counters.stale) == ("load", 25, 1)


def test_a_state_of_a_table_that_was_rebuilt_otherwise_is_made_anew(tmp_path: Path) -> None:
    world = build_world(tmp_path / "world")
    leave(world, tmp_path / "dumps")
    publish_catalogue(world, publish_sequences(world, random_events(world.event_schema, seed=7)))
    scorer = scorer_of(world)
    restore(StateDumps(str(tmp_path / "dumps"), "after"), scorer)
    expected = scorer_of(world)
    for user in USERS:
        np.testing.assert_allclose(
            ask(scorer, user).scores["label"], ask(expected, user).scores["label"], rtol=0, atol=1e-6
        )
    assert scorer.cache.counters.stale == NUM_USERS
    assert scorer.cache.counters.hit == 0


@pytest.mark.parametrize("what", ["model_version", "schema_hash", "encoding", "precision", "format"])
def test_a_dump_of_something_else_is_left_alone_told_once_and_counted(
    world: Settings, dumped: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = dumped / "before" / "_DUMP.json"
    told = json.loads(path.read_text())
    if what == "precision":
        told["layout"]["precision"] = "bf16"
    elif what == "format":
        told["format"] += 1
    else:
        told["version"][["model_version", "schema_hash", "encoding"].index(what)] = "another"
    path.write_text(json.dumps(told))
    dumps, scorer = StateDumps(str(dumped), "after"), scorer_of(world)
    assert restore(dumps, scorer) + restore(dumps, scorer) == []
    assert (dumps.counters.disagreeing, dumps.counters.torn, len(scorer.cache)) == (1, 0, 0)
    [line] = caplog.messages
    assert "before is left alone: of another model" in line


@pytest.mark.parametrize("how", ["no JSON", "half a JSON", "a file gone", "a file cut", "a byte changed"])
def test_a_torn_dump_is_left_alone_told_once_and_counted(
    world: Settings, dumped: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    told, data = dumped / "before" / "_DUMP.json", dumped / "before" / "states-00000.safetensors"
    whole = data.read_bytes()
    if how == "no JSON":
        told.unlink()
    elif how == "half a JSON":
        told.write_text(told.read_text()[:100])
    elif how == "a file gone":
        data.unlink()
    elif how == "a file cut":
        data.write_bytes(whole[:-1])
    else:
        data.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    dumps, scorer = StateDumps(str(dumped), "after"), scorer_of(world)
    assert restore(dumps, scorer) + restore(dumps, scorer) == []
    assert (dumps.counters.torn, dumps.counters.disagreeing, len(scorer.cache)) == (1, 0, 0)
    [line] = caplog.messages
    assert "before is left alone" in line
    assert ask(scorer, 5).source == "load"


def test_a_forgotten_user_does_not_come_back_by_a_dump(world: Settings, dumped: Path) -> None:
    scorer = scorer_of(world)
    StateDumps(str(dumped), "another").forget(scorer.user_key(3))
    (dumped / "forgotten" / ".tmp-of-one-that-was-killed").touch()
    dumps = StateDumps(str(dumped), "after")
    assert sorted(map(int, restore(dumps, scorer))) == [user for user in USERS if user != 3]
    dumps.write(scorer.cache, scorer.version, 60)
    assert 3 not in restore(StateDumps(str(dumped), "the next"), scorer_of(world))


def test_the_mark_of_a_forgotten_user_goes_when_no_dump_can_hold_the_user(world: Settings, dumped: Path) -> None:
    scorer, dumps = scorer_of(world), StateDumps(str(dumped), "after")
    for user, age_s in ((3, 10_000), (4, 0)):
        dumps.forget(scorer.user_key(user))
        mark = dumped / "forgotten" / f"{scorer.user_key(user)}.json"
        mark.write_text(json.dumps({"forgotten_s": json.loads(mark.read_text())["forgotten_s"] - age_s}))
    restore(dumps, scorer)
    dumps.write(scorer.cache, scorer.version, 60)
    assert dumps.forgotten() == {scorer.user_key(4)}


def test_a_dump_goes_when_a_replica_that_had_it_leaves_its_own(world: Settings, dumped: Path) -> None:
    """So that dumps do not pile up; one of a neighbour that stops at the same time stays."""
    neighbour, scorer = StateDumps(str(dumped), "neighbour"), scorer_of(world)
    dumps = StateDumps(str(dumped), "after")
    (dumped / "killed while it wrote").mkdir()
    (dumped / "killed while it wrote" / "states-00000.safetensors").write_bytes(b"half")
    assert dumps.names() == {"before"}
    restore(dumps, scorer)
    neighbour.write(scorer.cache, scorer.version, 60)
    (dumped / "writes just now").mkdir()
    (dumped / "writes just now" / "states-00000.safetensors").write_bytes(b"half")
    dumps.write(scorer.cache, scorer.version, 60)
    assert sorted(path.name for path in dumped.iterdir()) == ["after", "neighbour", "writes just now"]


def test_a_dump_in_s3_is_one_too(world: Settings, s3: str) -> None:
    scorer = scorer_of(world)
    before = {user: ask(scorer, user) for user in USERS}
    StateDumps(f"{s3}/dumps", "before").write(scorer.cache, scorer.version, 60)
    after, dumps = scorer_of(world), StateDumps(f"{s3}/dumps", "after")
    assert len(restore(dumps, after)) == NUM_USERS
    np.testing.assert_array_equal(ask(after, 7).scores["label"], before[7].scores["label"])
    dumps.forget(after.user_key(7))
    dumps.write(after.cache, after.version, 60)
    assert 7 not in restore(StateDumps(f"{s3}/dumps", "the next"), scorer_of(world))


def test_warming_encodes_the_most_active_users_into_free_room_only(world: Settings) -> None:
    scorer = scorer_of(world, device_states=1)
    assert scorer.history.most_active(3).to_pylist() == [9, 8, 7]
    assert scorer.warm(pending_users(pa.array([9, 8, 7]))) == 3
    assert scorer.warm(pending_users(pa.array([9, 8, 7]))) == 0
    assert [ask(scorer, user).source for user in (9, 8, 7, 6)] == ["hit", "hit", "hit", "load"]
    full = scorer_of(world, device_states=1)
    full.cache.host_budget_bytes = 0
    assert full.warm(pending_users(pa.array([9, 8, 7]))) == 1
    assert full.warm(pending_users(pa.array([8, 7]))) == 0
    assert full.cache.counters.evict == 0


def test_after_a_roll_out_warm_up_has_the_room_of_states_that_no_one_can_be_answered_from(tmp_path: Path) -> None:
    world = build_world(tmp_path / "world")
    scorer = scorer_of(world, device_states=2)
    scorer.cache.host_budget_bytes = 0
    assert scorer.warm(pending_users(pa.array([9, 8]))) == 2
    assert scorer.warm(pending_users(pa.array([7]))) == 0
    scorer.adopt(*scorer.load_checkpoint(publish_random_model(world, seed=1).path))
    assert scorer.warm(pending_users(pa.array([7, 8]))) == 2
    assert [ask(scorer, user).source for user in (7, 8, 9)] == ["hit", "hit", "load"]


def test_a_state_kept_of_another_model_shape_does_not_fit(world: Settings, dumped: Path) -> None:
    scorer, dumps = scorer_of(world), StateDumps(str(dumped), "after")
    other = replace(scorer.cache.layout, num_layers=9)
    assert list(dumps.states(scorer.version, other, lambda *_: True)) == []
    assert dumps.counters.disagreeing == 1
