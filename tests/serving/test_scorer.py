"""Whatever the cache holds, a request's scores are those of encoding its user from scratch at its time."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.config import Settings
from longer.errors import StorageError, UserError
from longer.hashing import stable_key
from longer.model.longer import Longer
from longer.serving.pending import pending_users, read_rows
from longer.serving.scorer import EventsRequest, Scorer, ScoreRequest, ScoreResult, Scoring, Tables
from longer.storage import Table
from longer.training.checkpoints import save_weights, weights_of
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

CANDIDATES = ["item1", "item5", "never seen", "item7"]
END_MS = START_MS + 30 * DAY_MS
BIG = 1 << 30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return build_world(tmp_path_factory.mktemp("world"))


def scorer_of(world: Settings, cache_bytes: int = BIG, items: bool = True, host_bytes: int = 0) -> Scorer:
    return Scorer(
        checkpoint_path(world),
        world.path("tables", "sequences"),
        cache_bytes,
        world.path("tables", "items") if items else None,
        host_bytes=host_bytes,
    )


def ask(scorer: Scorer, *asked: tuple[int, int], item_ids: list[str] = CANDIDATES) -> list[ScoreResult]:
    outcomes = scorer.score([ScoreRequest(user, item_ids, request_ts=ts) for user, ts in asked])
    assert not any(isinstance(outcome, UserError) for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, ScoreResult)]


def assert_same(left: ScoreResult, right: ScoreResult) -> None:
    np.testing.assert_allclose(left.scores["label"], right.scores["label"], rtol=1e-5, atol=1e-7)
    assert (left.num_events, left.last_event_ts) == (right.num_events, right.last_event_ts)


def times_of(world: Settings, user: int) -> list[int]:
    events = random_events(world.event_schema, seed=0)
    return events.filter(pa.compute.equal(events["user_id"], user))["event_ts"].cast(pa.int64()).to_pylist()


@settings(max_examples=25, deadline=None)
@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(3, NUM_USERS + 2), st.integers(-1, 31 * 96)), min_size=1, max_size=5),
        min_size=1,
        max_size=8,
    ),
    budgets=st.sampled_from([(0, 0), (30_000, 0), (0, 30_000), (10_000, 25_000), (BIG, 0)]),
)
def test_no_order_of_requests_and_no_eviction_changes_a_score(
    world: Settings, batches: list[list[tuple[int, int]]], budgets: tuple[int, int]
) -> None:
    cached, from_scratch = scorer_of(world, budgets[0], host_bytes=budgets[1]), scorer_of(world, 0)
    for batch in batches:
        asked = [(user, START_MS + quarter * (DAY_MS // 96)) for user, quarter in batch]
        try:
            got = cached.score([ScoreRequest(user, CANDIDATES, request_ts=ts) for user, ts in asked])
        finally:
            assert cached.cache.num_bytes <= budgets[0]
            assert cached.cache.host_bytes <= budgets[1]
        for outcome, one in zip(got, asked, strict=True):
            wanted = from_scratch.score([ScoreRequest(one[0], CANDIDATES, request_ts=one[1])])[0]
            if isinstance(
                wanted, UserError
            ):  # the table dropped that past; a state kept since may still answer, from a hit
                assert isinstance(outcome, UserError)
            else:
                assert isinstance(outcome, ScoreResult)
                assert_same(outcome, wanted)


def test_a_hit_reads_nothing(world: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_of(world)
    first = ask(scorer, (5, END_MS))[0]
    monkeypatch.setattr(scorer.history, "read", lambda *_: pytest.fail("read the table"))
    again = ask(scorer, (5, END_MS + DAY_MS))[0]
    assert (first.source, again.source) == ("load", "hit")
    assert again.num_events == 25


def test_a_state_ends_strictly_before_the_request(world: Settings) -> None:
    """At the time of an event the event is not seen, a millisecond later it is; events of one time come together."""
    times = times_of(world, 6)
    scorer = scorer_of(world)
    previous = 0
    for ts in sorted(set(times)):
        before, after = ask(scorer, (6, ts), (6, ts + 1))
        assert before.num_events == sum(t < ts for t in times) == previous
        assert after.num_events == previous + times.count(ts)
        assert before.source == ("hit" if previous else "cold")
        assert after.source == "append"
        previous = after.num_events
    assert scorer.cache.counters.load == 0


def test_users_whose_ids_have_one_key_are_never_scored_from_each_others_states_or_events(world: Settings) -> None:
    """A key has 63 bits, and an id 64: of a billion users two may share one, and whoever likes can compute such a pair."""
    namesakes = (5, -7677626428535463196)
    assert stable_key(namesakes[0]) == stable_key(namesakes[1])
    alone = {user: ask(scorer_of(world), (user, END_MS))[0] for user in namesakes}
    scorer = scorer_of(world)
    for user in (*namesakes, *namesakes):
        [found] = ask(scorer, (user, END_MS))
        assert_same(found, alone[user])
        assert found.source == alone[user].source
    assert [found.num_events for found in ask(scorer, *((user, END_MS) for user in namesakes))] == [25, 0]
    scorer.add_events([EventsRequest(5, {"event_ts": [END_MS], "item_id": ["item1"]})])
    assert [found.num_events for found in ask(scorer, *((user, END_MS + 1) for user in namesakes))] == [26, 0]


def test_what_one_has_sent_stays_while_another_user_of_her_key_is_warmed_restored_or_looked_at_again(
    world: Settings,
) -> None:
    """Nobody has asked for the other one."""
    other, sender = 7, 3048781524208496881
    assert stable_key(other) == stable_key(sender)
    scorer, elsewhere = scorer_of(world), scorer_of(world)
    for one, user in ((scorer, sender), (elsewhere, other)):
        one.add_events([EventsRequest(user, {"event_ts": [END_MS], "item_id": ["item1"]})])
    pending = pending_users(pa.array([other]))
    assert scorer.warmable(pending) == []
    assert scorer.online.restore(elsewhere.online.all()) == {}
    ask(scorer, (sender, END_MS))
    scorer.move_to(Tables(scorer.history._table, scorer.items))
    read_rows(scorer.history, pending)
    scorer.bring_up_to_date(pending)
    [found] = ask(scorer, (sender, END_MS + 1))
    assert (found.num_events, scorer.online.counters.dropped) == (1, 0)


def test_a_question_about_the_past_leaves_the_newer_state(world: Settings) -> None:
    """The time of the last event is past, too."""
    scorer = scorer_of(world)
    ask(scorer, (6, END_MS))
    for past_ts in (times_of(world, 6)[20], times_of(world, 6)[-1]):
        past = ask(scorer, (6, past_ts))[0]
        assert past.source == "load"
        assert_same(past, ask(scorer_of(world), (6, past_ts))[0])
    assert ask(scorer, (6, END_MS))[0].source == "hit"


def test_unknown_users_items_and_empty_histories_get_scores(world: Settings) -> None:
    scorer = scorer_of(world)
    unknown, before_all = ask(scorer, (10**12, END_MS), (6, START_MS - DAY_MS))
    for result in (unknown, before_all):
        assert (result.source, result.num_events, result.last_event_ts) == ("cold", 0, None)
        assert np.isfinite(result.scores["label"]).all()
        assert ((result.scores["label"] > 0) & (result.scores["label"] < 1)).all()
    assert ask(scorer, (6, START_MS - DAY_MS))[0].source == "hit"


def test_users_whom_the_table_does_not_know_push_nobody_out_of_the_cache(world: Settings) -> None:
    scorer = scorer_of(world)
    ask(scorer, (6, END_MS))
    before = scorer.cache.num_bytes
    ask(scorer, *((10**12 + stranger, END_MS) for stranger in range(20)))
    assert (len(scorer.cache), scorer.cache.num_bytes) == (1, before)
    assert ask(scorer, (6, END_MS))[0].source == "hit"


def test_two_requests_of_one_user_in_one_batch_are_answered_in_order(world: Settings) -> None:
    middle = times_of(world, 8)[50]
    together = ask(scorer_of(world), (8, middle), (3, END_MS), (8, END_MS), (8, middle))
    assert [r.source for r in together] == ["load", "load", "append", "load"]
    for result, one in zip(together, [(8, middle), (3, END_MS), (8, END_MS), (8, middle)], strict=True):
        assert_same(result, ask(scorer_of(world), one)[0])


def test_an_evicted_user_is_loaded_again_with_the_same_scores(world: Settings) -> None:
    big = scorer_of(world)
    ask(big, (9, END_MS))
    one_state = scorer_of(world, big.cache.num_bytes)
    first, _, again = (ask(one_state, (user, END_MS))[0] for user in (9, 8, 9))
    assert again.source == "load"
    assert one_state.cache.counters.evict == 2
    np.testing.assert_array_equal(first.scores["label"], again.scores["label"])


def test_a_state_pushed_out_to_host_memory_comes_back_without_a_read(
    world: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = scorer_of(world)
    ask(big, (9, END_MS))
    scorer = scorer_of(world, big.cache.num_bytes, host_bytes=2 * big.cache.num_bytes)
    first = ask(scorer, (9, END_MS))[0]
    ask(scorer, (8, END_MS))
    assert (scorer.cache.counters.demote, scorer.cache.counters.evict) == (1, 0)
    monkeypatch.setattr(scorer.history, "read", lambda *_: pytest.fail("read the table"))
    again = ask(scorer, (9, END_MS))[0]
    assert (again.source, scorer.cache.counters.promote) == ("hit", 1)
    np.testing.assert_array_equal(first.scores["label"], again.scores["label"])
    assert scorer.cache.host_bytes > 0
    for user in (8, 9):
        assert scorer.forget(user)
    assert (scorer.cache.num_bytes, scorer.cache.host_bytes, len(scorer.cache)) == (0, 0, 0)


def test_given_item_features_win_over_the_catalogue_and_missing_ones_fall_back(world: Settings) -> None:
    bare, full = scorer_of(world, items=False), scorer_of(world)
    known = ["item1", "item5"]
    wanted = ask(full, (5, END_MS), item_ids=known)[0]
    for features in (
        {"category": ["category1", "category2"], "price": [1.0, 5.0]},
        {"category": ["category1", None], "price": [None, 5]},
    ):
        got = full.score([ScoreRequest(5, known, features, END_MS)])[0]
        assert isinstance(got, ScoreResult)
        assert_same(got, wanted)
    given_all = bare.score([ScoreRequest(5, known, {"category": ["category1", "category2"], "price": [1, 5]}, END_MS)])
    assert isinstance(given_all[0], ScoreResult)
    assert_same(given_all[0], wanted)
    nothing_known = ask(bare, (5, END_MS), item_ids=known)[0]
    assert np.abs(nothing_known.scores["label"] - wanted.scores["label"]).max() > 1e-4


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ScoreRequest("5", ["item1"]), "user_id: expected int64 values"),
        (ScoreRequest(2**63, ["item1"]), "user_id: expected int64 values"),
        (ScoreRequest(5, [1]), "candidates: expected string values"),
        (ScoreRequest(5, ["a"], {"price": ["secret"]}), "candidates.price: expected float values"),
        (ScoreRequest(5, ["a"], {"secret": [1]}), "candidates: unknown item feature: this model reads category, price"),
        (ScoreRequest(5, ["a"], request_ts=END_MS // 1000), "request_ts: before 1990: expected milliseconds"),
        (ScoreRequest(5, ["a"], request_ts=2**63), "request_ts: expected milliseconds since 1970"),
        (ScoreRequest(5, ["a"], request_ts=-1), "request_ts: expected milliseconds since 1970"),
        (ScoreRequest(9, ["a"], request_ts=START_MS), "request_ts: the sequence table no longer keeps"),
    ],
)
def test_a_bad_request_has_one_line_without_its_values_and_spoils_no_other(
    world: Settings, request_: ScoreRequest, message: str
) -> None:
    good = ScoreRequest(5, ["item1"], request_ts=END_MS)
    outcomes = scorer_of(world).score([good, request_, good])
    assert isinstance(outcomes[1], UserError)
    assert str(outcomes[1]).startswith(message)
    assert "secret" not in str(outcomes[1])
    assert isinstance(outcomes[0], ScoreResult)
    assert isinstance(outcomes[2], ScoreResult)


def test_a_user_taken_from_an_array_is_the_user_that_a_body_names(world: Settings) -> None:
    scorer = scorer_of(world)
    user_id: Any = np.int64(5)
    [got] = scorer.score([ScoreRequest(user_id, CANDIDATES, request_ts=END_MS)])
    assert isinstance(got, ScoreResult)
    [again] = scorer.score([ScoreRequest(5, CANDIDATES, request_ts=END_MS)])
    assert isinstance(again, ScoreResult)
    assert again.source == "hit"


def test_a_new_table_version_appends_its_events_and_drops_states_whose_past_has_changed(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    events = random_events(world.event_schema, seed=0)
    scorer = scorer_of(world)
    ask(scorer, (6, END_MS + DAY_MS), (7, END_MS + DAY_MS), (8, END_MS + DAY_MS))

    def more(user: int, ts: int, **other: str) -> pa.Table:
        row = {name: events[name][0].as_py() for name in events.column_names} | {"user_id": user, **other}
        del row["event_ts"]
        return pa.Table.from_pylist([row | {"event_ts": pa.scalar(ts, pa.timestamp("ms", "UTC"))}], events.schema)

    late = times_of(world, 7)[-2] + 1
    new_item = more(9, END_MS, item_id="brand new", category="category1")
    sequences = publish_sequences(world, pa.concat_tables([events, more(6, END_MS), more(7, late), new_item]))
    assert ask(scorer, (6, END_MS + DAY_MS))[0].source == "hit"
    with pytest.raises(UserError, match="items"):  # sequences are published before their catalogue: wait for both
        scorer.newer_tables()
    assert ask(scorer, (6, END_MS + DAY_MS))[0].source == "hit"
    publish_catalogue(world, sequences)
    newer = scorer.newer_tables()
    assert newer
    scorer.move_to(newer)
    assert scorer.newer_tables() is None
    unheard = ScoreRequest(5, ["brand new"], request_ts=END_MS + DAY_MS)
    assert_same(scorer.score([unheard])[0], scorer_of(world).score([unheard])[0])
    asked = [(user, END_MS + DAY_MS) for user in (6, 7, 8)]
    results = ask(scorer, *asked)
    assert [r.source for r in results] == ["append", "load", "hit"]
    assert scorer.cache.counters.stale == 1
    for result, one in zip(results, asked, strict=True):
        assert_same(result, ask(scorer_of(world), one)[0])


def look_again(scorer: Scorer, user_ids: pa.Array) -> None:
    users = pending_users(user_ids)
    read_rows(scorer.history, users)
    scorer.bring_up_to_date(users)


def publish_more(world: Settings, new: list[tuple[int, int]]) -> None:
    """A table with one more event of these users and times, and its catalogue."""
    events = random_events(world.event_schema, seed=0)
    row = {name: events[name][0].as_py() for name in events.column_names}
    more = [row | {"user_id": user, "event_ts": pa.scalar(ts, pa.timestamp("ms", "UTC"))} for user, ts in new]
    sequences = publish_sequences(world, pa.concat_tables([events, pa.Table.from_pylist(more, events.schema)]))
    publish_catalogue(world, sequences)


def move_to_newer(scorer: Scorer, world: Settings, new: list[tuple[int, int]]) -> None:
    publish_more(world, new)
    newer = scorer.newer_tables()
    assert newer
    scorer.move_to(newer)


def test_after_a_refresh_the_next_requests_of_held_users_are_hits_without_a_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those with something new too; one who was asked for about the past keeps the state that answers such."""
    world = build_world(tmp_path)
    scorer, past = scorer_of(world), times_of(world, 8)[50]
    asked = [(5, END_MS + DAY_MS), (6, END_MS + DAY_MS), (7, END_MS + DAY_MS), (8, past)]
    ask(scorer, *asked)
    late = times_of(world, 7)[-2] + 1
    move_to_newer(scorer, world, [(6, END_MS), (7, late), (8, END_MS), (9, END_MS)])
    before = [held.user_key for held, _ in scorer.cache.hottest(scorer.version)]
    held = scorer.held_of_other_tables()
    assert held.to_pylist() == [8, 7, 6, 5]  # who was asked for last first
    look_again(scorer, held)
    after = [held.user_key for held, _ in scorer.cache.hottest(scorer.version)]
    assert scorer.held_of_other_tables().to_pylist() == []
    assert after == [key for key in before if key != scorer.user_key(7)]  # it was no use of them
    assert scorer.cache.counters.stale == 1
    with monkeypatch.context() as patched:
        patched.setattr(scorer.history, "read", lambda *_: pytest.fail("read the table"))
        results = ask(scorer, *(one for one in asked if one[0] != 7))
    assert [result.source for result in results] == ["hit"] * 3
    results += ask(scorer, asked[2])
    for result, one in zip(results, [asked[0], asked[1], asked[3], asked[2]], strict=True):
        assert_same(result, ask(scorer_of(world), one)[0])


def test_a_state_in_host_memory_stays_there_when_it_is_looked_at_again(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    scorer = scorer_of(world, 0, host_bytes=BIG)
    asked = [(5, END_MS + DAY_MS), (6, END_MS + DAY_MS)]
    ask(scorer, *asked)
    move_to_newer(scorer, world, [(6, END_MS)])
    look_again(scorer, scorer.held_of_other_tables())
    assert (len(scorer.cache), scorer.cache.num_bytes, scorer.cache.counters.promote) == (2, 0, 0)
    results = ask(scorer, *asked)
    assert [result.source for result in results] == ["hit", "append"]
    for result, one in zip(results, asked, strict=True):
        assert_same(result, ask(scorer_of(world), one)[0])


def test_a_row_that_was_read_before_the_tables_moved_once_more_brings_no_state_up_to_date(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    scorer = scorer_of(world)
    ask(scorer, (5, END_MS + DAY_MS))
    move_to_newer(scorer, world, [(6, END_MS)])
    users = pending_users(scorer.held_of_other_tables())
    read_rows(scorer.history, users)
    move_to_newer(scorer, world, [(5, END_MS + 1)])
    scorer.bring_up_to_date(users)
    assert ask(scorer, (5, END_MS + DAY_MS))[0].num_events == 26


def test_events_sent_online_while_the_table_was_read_are_seen_and_a_row_of_another_version_is_read_again(
    tmp_path: Path,
) -> None:
    world = build_world(tmp_path)
    scorer = scorer_of(world)
    waits = [Scoring(ScoreRequest(user, CANDIDATES, request_ts=END_MS + DAY_MS)) for user in (5, 6, 5)]
    unread = scorer.attempt(waits)
    assert len(unread) == 3
    read_rows(scorer.history, unread)
    sent = {"item_id": ["item1"], "event_ts": [END_MS], "action": ["view"], "category": ["category1"]}
    sent = {name: values for name, values in sent.items() if name in world.event_schema.events_arrow().names}
    scorer.add_events([EventsRequest(5, sent)])
    move_to_newer(scorer, world, [(6, END_MS)])
    unread = scorer.attempt(waits)
    assert len(unread) == 3
    read_rows(scorer.history, unread)
    assert scorer.attempt(waits) == []
    results = [one.outcome for one in waits if isinstance(one.outcome, ScoreResult)]
    assert [(result.source, result.num_events) for result in results] == [("load", 26), ("load", 37), ("hit", 26)]


def test_what_an_attempt_that_failed_has_left_is_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is nobody's any more, and the table may have moved since."""
    world = build_world(tmp_path)
    scorer, waits = scorer_of(world, 0), [Scoring(ScoreRequest(5, CANDIDATES, request_ts=END_MS + DAY_MS))]
    read_rows(scorer.history, scorer.attempt(waits))

    def fails(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(scorer._engine, "score", fails)
        with pytest.raises(MemoryError):
            scorer.attempt(waits)
    move_to_newer(scorer, world, [(5, END_MS)])
    unread = scorer.attempt(waits)
    assert ([one.user_key for one in unread], waits[0].outcome) == ([scorer.user_key(5)], None)
    read_rows(scorer.history, unread)
    assert scorer.attempt(waits) == []
    assert isinstance(waits[0].outcome, ScoreResult)
    assert waits[0].outcome.num_events == 26


def test_states_of_another_model_are_misses_and_a_checkpoint_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    scorer, first_path = scorer_of(world), checkpoint_path(world)
    before = ask(scorer, (6, END_MS))[0]
    second_path = publish_random_model(world, seed=1).path
    scorer.adopt(*scorer.load_checkpoint(second_path))
    after = ask(scorer, (6, END_MS))[0]
    assert (after.source, scorer.cache.counters.stale) == ("load", 1)
    assert_same(after, ask(scorer_of(world), (6, END_MS))[0])
    assert np.abs(after.scores["label"] - before.scores["label"]).max() > 1e-3
    scorer.adopt(*scorer.load_checkpoint(first_path))
    assert_same(ask(scorer, (6, END_MS))[0], before)

    model, info = scorer.load_checkpoint(second_path)
    with torch.no_grad():
        model.norm_head.weight[0] = np.nan
    save_weights(str(tmp_path / "nan"), weights_of(model), info.model, info.schema, info.tasks)
    longer = world.model.model_copy(update={"history_events": 64})
    save_weights(
        str(tmp_path / "longer"), weights_of(Longer(longer, info.schema, info.tasks)), longer, info.schema, info.tasks
    )
    schema = info.schema.model_copy(update={"features": info.schema.features[:1]})
    save_weights(
        str(tmp_path / "schema"), weights_of(Longer(info.model, schema, info.tasks)), info.model, schema, info.tasks
    )
    for name, reason in (
        ("nan", "not finite"),
        ("longer", "keeps 40 events"),
        ("schema", "event_schema"),
        ("x", "no such"),
    ):
        with pytest.raises(UserError, match=reason):
            scorer.load_checkpoint(str(tmp_path / name))
    assert ask(scorer, (6, END_MS))[0].source == "hit"


def test_tables_and_checkpoint_may_lie_on_s3(s3: str) -> None:
    local = ask(scorer_of(build_world(f"{s3}/run")), (5, END_MS))[0]
    assert local.num_events == 25


def test_a_bucket_that_cannot_be_read_fails_its_own_users_only(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    healthy = ask(scorer_of(world), *((user, END_MS) for user in range(1, NUM_USERS + 1)))
    damaged = Path(Table(world.path("tables", "sequences")).require("jobs.build_sequences").files()[0])
    content = bytearray(damaged.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)  # the footer stays whole
    damaged.write_bytes(content)
    asked = [ScoreRequest(user, CANDIDATES, request_ts=END_MS) for user in range(1, NUM_USERS + 1)]
    outcomes = scorer_of(world).score(asked)
    failed = [outcome for outcome in outcomes if isinstance(outcome, UserError)]
    assert 0 < len(failed) < len(outcomes)
    assert all(isinstance(error, StorageError) and str(damaged) in str(error) for error in failed)
    for outcome, wanted in zip(outcomes, healthy, strict=True):
        if isinstance(outcome, ScoreResult):
            assert_same(outcome, wanted)
