"""States that outlive their replica: what is restored scores as before, and what must not come back does not."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from longer.config import Settings
from longer.model.state_layout import Precision
from longer.serving.dump_files import Manifest
from longer.serving.dumps import StateDumps
from longer.serving.online import EventLimits
from longer.serving.pending import pending_users
from longer.serving.scorer import EventsRequest, Scorer, ScoreRequest, ScoreResult
from tests.serving.restarts import restore
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


def scorer_of(
    world: Settings, device_states: int = 2, precision: Precision = "float32", host_bytes: int = 1 << 20
) -> Scorer:
    """With room for so many states on the device, and for all users' in host memory."""
    scorer = Scorer(
        checkpoint_path(world),
        world.path("tables", "sequences"),
        0,
        world.path("tables", "items"),
        host_bytes=host_bytes,
        state_precision=precision,
    )
    scorer.cache.budget_bytes = device_states * scorer.cache.most_state_bytes
    return scorer


def ask(scorer: Scorer, user: int, **more: Any) -> ScoreResult:
    [result] = scorer.score([ScoreRequest(user, ITEMS, **{"request_ts": END_MS, **more})])
    assert isinstance(result, ScoreResult), result
    return result


def leave(world: Settings, folder: Path, precision: Precision = "float32") -> dict[int, ScoreResult]:
    """What a replica answered all users before it left its states in the folder."""
    scorer = scorer_of(world, precision=precision)
    answers = {user: ask(scorer, user) for user in USERS}
    assert StateDumps(str(folder), "before").write(scorer.cache, scorer.online, scorer.version, 60) == NUM_USERS
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
    for user in USERS:
        grown = ask(restored, user, request_ts=END_MS + 20, events=sent(END_MS, 9))
        assert grown.source == "append"
        anew = ask(other, user, request_ts=END_MS + 20, events=sent(END_MS, 9))
        np.testing.assert_allclose(grown.scores["label"], anew.scores["label"], rtol=0, atol=1e-6)


def test_each_replica_takes_what_is_its_own_the_hottest_where_room_is_short(world: Settings, tmp_path: Path) -> None:
    scorer = scorer_of(world, host_bytes=50_000)
    for user in [*USERS[:-1], 4, 2, USERS[-1]]:  # 4 and 2 come back, and whoever comes last has not
        ask(scorer, user)
    StateDumps(str(tmp_path), "before").write(scorer.cache, scorer.online, scorer.version, 60)
    dumps = StateDumps(str(tmp_path), "after")
    assert sorted(map(int, restore(dumps, scorer_of(world), lambda user: int(user) % 2 == 1))) == [1, 3, 5, 7, 9]
    small = scorer_of(world)
    small.cache.host_budget_bytes = 2 * small.cache.most_state_bytes
    assert restore(dumps, small)[:2] == [2, 4]


def sent(first_ts: int, num_events: int, item: str = "item2") -> dict[str, list[Any]]:
    """Columns of events to send, one a millisecond."""
    return {
        "item_id": [item] * num_events,
        "event_ts": [first_ts + n for n in range(num_events)],
        "action": ["buy"] * num_events,
        "category": ["category2"] * num_events,
        "price": [2.0] * num_events,
        "quantity": [1.0] * num_events,
    }


def stop(scorer: Scorer, folder: Path) -> None:
    StateDumps(str(folder), "before").write(scorer.cache, scorer.online, scorer.version, 60)


def publish_with_online(world: Settings, scorer: Scorer) -> None:
    """The tables catch up with what was sent to the scorer."""
    online = scorer.online.of([scorer.user_key(user) for user in USERS])
    events = pa.concat_tables([random_events(world.event_schema, seed=0), online])
    publish_catalogue(world, publish_sequences(world, events))


def test_a_restored_replica_answers_as_one_that_never_stopped_and_counts_what_was_sent_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events were sent with a request, after it, late, for a user who was not asked about, and for one whose state has gone."""
    world = build_world(tmp_path / "world")
    before = scorer_of(world)
    for user in (5, 6, 7, 9):
        ask(before, user)
    ask(before, 4, request_ts=END_MS + 5, events=sent(END_MS, 2))
    posted = {5: sent(END_MS, 3), 6: sent(END_MS - 40 * DAY_MS, 1), 8: sent(END_MS, 9), 9: sent(END_MS, 1)}
    before.add_events([EventsRequest(user, events) for user, events in posted.items()])
    before.cache.forget(before.user_key(9))
    stop(before, tmp_path / "dumps")
    after = scorer_of(world)
    assert sorted(map(int, restore(StateDumps(str(tmp_path / "dumps"), "after"), after))) == [4, 5, 6, 7]
    assert after.online.counters.as_dict() == {**dict.fromkeys(after.online.counters.as_dict(), 0), "restored": 16}
    with monkeypatch.context() as patched:
        patched.setattr(after.history, "read", lambda *_: pytest.fail("read the table"))
        assert {ask(after, user, request_ts=END_MS + 5).source for user in (4, 5, 7)} == {"hit"}
    told = {user: ask(before, user, request_ts=END_MS + 20) for user in USERS}
    for user in USERS:
        answer = ask(after, user, request_ts=END_MS + 20)
        assert answer.num_events == told[user].num_events == user * user + {4: 2, 5: 3, 6: 1, 8: 9, 9: 1}.get(user, 0)
        np.testing.assert_allclose(answer.scores["label"], told[user].scores["label"], rtol=0, atol=1e-6)
    assert (after.cache.counters.stale, before.cache.counters.stale) == (1, 1)  # of the user whose event was late
    publish_with_online(world, before)
    newer = after.newer_tables()
    assert newer
    after.move_to(newer)
    for user in USERS:
        again = ask(after, user, request_ts=END_MS + 20)
        assert (again.source, again.num_events) == ("hit", told[user].num_events)
        np.testing.assert_allclose(again.scores["label"], told[user].scores["label"], rtol=0, atol=1e-6)


def test_events_come_back_where_some_have_come_meanwhile_each_once(world: Settings, tmp_path: Path) -> None:
    """Two replicas before had some of the same; the one that runs had a state made without any, and has had one sent again."""
    neighbours = [StateDumps(str(tmp_path), name) for name in ("first", "second")]
    for dumps, events in zip(neighbours, (sent(END_MS, 3), sent(END_MS + 2, 3)), strict=True):
        scorer = scorer_of(world)
        ask(scorer, 5, request_ts=END_MS + 9, events=events)
        dumps.write(scorer.cache, scorer.online, scorer.version, 60)
    scorer = scorer_of(world)
    assert ask(scorer, 5, request_ts=END_MS + 20, events=sent(END_MS + 4, 4)).num_events == 29
    restore(StateDumps(str(tmp_path), "after"), scorer)
    restore(StateDumps(str(tmp_path), "after"), scorer)
    assert (ask(scorer, 5, request_ts=END_MS + 20).num_events, scorer.online.counters.restored) == (33, 4)
    stop(scorer, tmp_path)
    last = scorer_of(world)
    restore(StateDumps(str(tmp_path), "last"), last)
    answer = ask(last, 5, request_ts=END_MS + 20)
    assert (answer.source, answer.num_events) == ("hit", 33)


def test_events_come_back_to_another_model_and_not_to_another_schema(tmp_path: Path) -> None:
    world = build_world(tmp_path / "world")
    before = scorer_of(world)
    before.add_events([EventsRequest(5, sent(END_MS, 3))])
    stop(before, tmp_path / "dumps")
    publish_random_model(world, seed=1)
    after, dumps = scorer_of(world), StateDumps(str(tmp_path / "dumps"), "after")
    assert list(dumps.events(dumps.listed(), "another schema", lambda _: True)) == []
    assert restore(dumps, after) == []
    assert ask(after, 5, request_ts=END_MS + 9).num_events == 28


def test_old_events_do_not_come_back_and_others_are_as_old_as_they_were(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, now_s, keep_s = scorer_of(world), time.time(), EventLimits().keep_s
    monkeypatch.setattr(time, "time", lambda: now_s)
    for n in range(3):
        before.add_events([EventsRequest(5, sent(END_MS + n, 1))])
        now_s += 100
    stop(before, tmp_path)
    after = scorer_of(world)
    now_s += keep_s - 250
    restore(StateDumps(str(tmp_path), "after"), after)
    assert ask(after, 5, request_ts=END_MS + 9).num_events == 27
    now_s += 100
    assert (ask(after, 5, request_ts=END_MS + 9).num_events, after.online.counters.expired) == (26, 1)


def test_events_of_before_take_only_free_room_those_who_sent_last_first(world: Settings, tmp_path: Path) -> None:
    before, after = scorer_of(world), scorer_of(world)
    before.add_events([EventsRequest(user, sent(END_MS, 1)) for user in (1, 2, 3)])
    for user in (3, 1):
        before.add_events([EventsRequest(user, sent(END_MS + 1, 1))])
    stop(before, tmp_path)
    after.add_events([EventsRequest(9, sent(END_MS, 1))])
    after.online._limits = EventLimits(max_bytes=3 * after.online.num_bytes + 200)
    restore(StateDumps(str(tmp_path), "after"), after)
    held = [user for user in USERS if after.online.revision(after.user_key(user))]
    assert held == [1, 3, 9]
    assert ask(after, 1, request_ts=END_MS + 9).num_events == 3


def test_a_state_whose_events_did_not_come_back_is_made_anew(world: Settings, tmp_path: Path) -> None:
    """What they left must not pass for the history that is known now."""
    scorer = scorer_of(world)
    assert ask(scorer, 5, request_ts=END_MS + 5, events=sent(END_MS, 1)).num_events == 26
    stop(scorer, tmp_path)
    after = scorer_of(world)
    ask(after, 6, events=sent(END_MS, 2))  # a revision as high as the other's was
    after.online._limits = EventLimits(keep_s=0)
    assert restore(StateDumps(str(tmp_path), "after"), after) == [5]
    answer = ask(after, 5, request_ts=END_MS + 5)
    assert (answer.source, answer.num_events, after.cache.counters.stale) == ("load", 25, 1)


def test_a_state_that_lacks_a_late_event_is_made_anew_where_all_events_come_back(
    world: Settings, tmp_path: Path
) -> None:
    """That it holds some of them, and that exactly those are known that were, does not make it true."""
    before, after = scorer_of(world), scorer_of(world)
    assert ask(before, 5, request_ts=END_MS + 5, events=sent(END_MS, 2)).num_events == 27
    before.add_events([EventsRequest(5, sent(END_MS - 40 * DAY_MS, 1))])
    stop(before, tmp_path)
    assert restore(StateDumps(str(tmp_path), "after"), after) == [5]
    answer = ask(after, 5, request_ts=END_MS + 5)
    assert (answer.source, answer.num_events, after.cache.counters.stale) == ("load", 28, 1)


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
    path.write_text(Manifest.model_validate(told).sealed().model_dump_json())
    dumps, scorer = StateDumps(str(dumped), "after"), scorer_of(world)
    assert restore(dumps, scorer) + restore(dumps, scorer) == []
    assert (dumps.counters.disagreeing, dumps.counters.torn, len(scorer.cache)) == (1, 0, 0)
    [line] = caplog.messages
    assert "before is left alone: of another model" in line


@pytest.mark.parametrize(
    "how", ["no JSON", "half a JSON", "another table", "a user more", "a file gone", "a file cut", "a byte changed"]
)
def test_a_torn_dump_is_left_alone_told_once_and_counted(
    world: Settings, dumped: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    told, data = dumped / "before" / "_DUMP.json", dumped / "before" / "states-00000.safetensors"
    whole = data.read_bytes()
    if how == "no JSON":
        told.unlink()
    elif how == "half a JSON":
        told.write_text(told.read_text()[:100])
    elif how == "another table":  # whose rows would never be looked at
        manifest = Manifest.model_validate_json(told.read_text())
        told.write_text(manifest.model_copy(update={"tables": ["v2"]}).model_dump_json())
    elif how == "a user more":
        told.write_text(told.read_text().replace('"user_ids":[', '"user_ids":[7,'))
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
    StateDumps(str(dumped), "another").forgotten.mark(scorer.user_key(3))
    (dumped / "forgotten" / ".tmp-of-one-that-was-killed").touch()
    dumps = StateDumps(str(dumped), "after")
    assert sorted(map(int, restore(dumps, scorer))) == [user for user in USERS if user != 3]
    dumps.write(scorer.cache, scorer.online, scorer.version, 60)
    assert 3 not in restore(StateDumps(str(dumped), "the next"), scorer_of(world))


def test_what_a_forgotten_user_sent_does_not_come_back_by_a_dump(world: Settings, tmp_path: Path) -> None:
    before, after = scorer_of(world), scorer_of(world)
    before.add_events([EventsRequest(user, sent(END_MS, 1)) for user in (3, 4)])
    stop(before, tmp_path)
    StateDumps(str(tmp_path), "another").forgotten.mark(before.user_key(3))
    assert restore(StateDumps(str(tmp_path), "after"), after) == []
    assert [user for user in USERS if after.online.revision(after.user_key(user))] == [4]


def test_the_mark_of_a_forgotten_user_goes_when_no_dump_can_hold_the_user(world: Settings, dumped: Path) -> None:
    scorer, dumps = scorer_of(world), StateDumps(str(dumped), "after")
    for user, age_s in ((3, 10_000), (4, 0)):
        dumps.forgotten.mark(scorer.user_key(user))
        [mark] = (dumped / "forgotten").glob(f"{scorer.user_key(user)}-*")
        mark.rename(mark.with_name(f"{scorer.user_key(user)}-{int(mark.name.rpartition('-')[2]) - age_s * 1000}"))
    dumps.remove_old(dumps.listed())
    assert set(dumps.forgotten.times_s()) == {scorer.user_key(4)}


def test_a_dump_goes_when_a_replica_has_known_it_so_long_that_all_have_brought_it(
    world: Settings, dumped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that dumps, and forgotten users in them, do not stay; one that others may be reading, or that is being written, does."""
    neighbour, scorer = StateDumps(str(dumped), "neighbour"), scorer_of(world)
    dumps, now_s = StateDumps(str(dumped), "after"), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    (dumped / "killed while it wrote").mkdir()
    (dumped / "killed while it wrote" / "states-00000.safetensors").write_bytes(b"half")
    assert dumps.listed().names == {"before"}
    now_s += 700
    leave_as(neighbour, world)
    (dumped / "writes just now").mkdir()
    (dumped / "writes just now" / "states-00000.safetensors").write_bytes(b"half")
    restore(dumps, scorer)
    dumps.remove_old(dumps.listed())
    assert sorted(path.name for path in dumped.iterdir()) == ["neighbour", "writes just now"]


def test_of_a_dump_that_runs_out_of_time_the_events_and_what_was_written_stay(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("longer.serving.dump_files._FILE_BYTES", 1)
    before = scorer_of(world)
    for user in USERS:
        ask(before, user, events={"event_ts": [END_MS - 1], "item_id": ["item1"]})
    dumps, written = StateDumps(str(tmp_path), "before"), list[str]()
    as_it_is = dumps._write_file

    def slowly(name: str, content: Any) -> Any:
        written.append(name)
        if len(written) > 4:
            time.sleep(1.0)
        return as_it_is(name, content)

    monkeypatch.setattr(dumps, "_write_file", slowly)
    num_states = dumps.write(before.cache, before.online, before.version, 0.5)
    assert 0 < num_states < NUM_USERS
    assert "could not be written in time" in caplog.text
    after = scorer_of(world)
    assert len(restore(StateDumps(str(tmp_path), "after"), after)) == num_states
    assert len(after.online) == len(before.online)


def leave_as(dumps: StateDumps, world: Settings) -> None:
    scorer = scorer_of(world)
    ask(scorer, 5)
    assert dumps.write(scorer.cache, scorer.online, scorer.version, 60) == 1


def test_a_dump_stays_that_was_long_in_writing_until_all_have_had_time_to_bring_what_was_written_last(
    world: Settings, dumped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps, now_s = StateDumps(str(dumped), "after"), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    (dumped / "before" / "_DUMP.json").rename(dumped / "whole later")
    dumps.listed()
    now_s += 500
    (dumped / "whole later").rename(dumped / "before" / "_DUMP.json")
    restore(dumps, scorer_of(world))
    for waits_s, is_there in ((500, True), (200, False)):
        now_s += waits_s
        dumps.remove_old(dumps.listed())
        assert (dumped / "before").exists() == is_there


def test_a_dump_that_a_replica_has_not_brought_back_stays(
    world: Settings, dumped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The events in it are nowhere else: it had not begun, or one was written to the end after it looked."""
    dumps, now_s = StateDumps(str(dumped), "after"), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    (dumped / "before" / "_DUMP.json").rename(dumped / "whole later")
    restore(dumps, scorer_of(world))
    (dumped / "whole later").rename(dumped / "before" / "_DUMP.json")
    (dumped / "unread").mkdir()
    shutil.copytree(dumped / "before", dumped / "unread", dirs_exist_ok=True)
    dumps.listed()
    now_s += 700
    dumps.remove_old(dumps.listed())
    assert sorted(path.name for path in dumped.iterdir()) == ["before", "unread"]


def test_events_come_back_of_a_dump_whose_states_are_cut(world: Settings, tmp_path: Path) -> None:
    """States can be made anew, events are nowhere else; and the other way round."""
    before = scorer_of(world)
    ask(before, 4, request_ts=END_MS + 5, events=sent(END_MS, 2))
    for name in ("states-00000.safetensors", "events.parquet"):
        stop(before, tmp_path)
        (tmp_path / "before" / name).write_bytes(b"cut")
        dumps, after = StateDumps(str(tmp_path), "after"), scorer_of(world)
        is_of_states = name.startswith("states")
        assert restore(dumps, after) == ([] if is_of_states else [4])
        assert (len(after.online), dumps.counters.torn) == (1 if is_of_states else 0, 1)


def test_a_dump_in_s3_is_one_too(world: Settings, s3: str) -> None:
    scorer = scorer_of(world)
    before = {user: ask(scorer, user) for user in USERS}
    StateDumps(f"{s3}/dumps", "before").write(scorer.cache, scorer.online, scorer.version, 60)
    after, dumps = scorer_of(world), StateDumps(f"{s3}/dumps", "after")
    assert len(restore(dumps, after)) == NUM_USERS
    np.testing.assert_array_equal(ask(after, 7).scores["label"], before[7].scores["label"])
    dumps.forgotten.mark(after.user_key(7))
    dumps.write(after.cache, after.online, after.version, 60)
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
    assert list(dumps.states(dumps.listed(), scorer.version, other, lambda *_: True)) == []
    assert dumps.counters.disagreeing == 1
