"""Whatever the table and the callers say in whatever order, a score is that of the history recomputed in plain Python.

An event is a tuple in the log's canonical order: time, item, action, category, price, quantity.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.arrays import NO_EVENT_TS, Candidates, Histories
from longer.config import Settings
from longer.data.sequences import KeepRule
from longer.errors import UserError
from longer.hashing import stable_keys
from longer.model.outputs import to_scores
from longer.model.states import score
from longer.serving import online
from longer.serving.online import EventLimits, beyond
from longer.serving.scorer import EventsRequest, EventsResult, Scorer, ScoreRequest, ScoreResult
from tests.data.tables import publish_sequences
from tests.model.generate import encoded, pool_for
from tests.serving.tables import (
    START_MS,
    build_world,
    checkpoint_path,
    publish_catalogue,
    publish_random_model,
    random_events,
    tiny_settings,
)
from tests.serving.tables import publish_sequences as publish_of_world

CANDIDATES = ["item1", "item5", "never seen"]
FIELDS = ["event_ts", "item_id", "action", "category", "price", "quantity"]
KEEP = KeepRule(keep_events=20, stride_events=4)  # the fewest that hold the windows of tables.py's model
USERS = (1, 2)
HOUR_MS = 3_600_000

Event = tuple[int, str, str | None, str | None, float | None, float | None]


def event(hour: int, kind: int) -> Event:
    missing = kind == 2
    return (
        START_MS + hour * HOUR_MS,
        f"item{kind}",
        None if missing else "buy",
        f"category{kind % 2}",
        None if missing else float(kind),
        1.0,
    )


def in_order(events: Counter[Event]) -> list[Event]:
    """Oldest to newest, missing values last."""
    return sorted(events.elements(), key=lambda e: [(value is None, value or 0) for value in e])


def columns_of(events: list[Event]) -> dict[str, list[Any]]:
    return {name: [e[place] for e in events] for place, name in enumerate(FIELDS)}


def log_of(tables: dict[int, Counter[Event]], schema: Any) -> pa.Table:
    rows = [(user, *e) for user, events in tables.items() for e in in_order(events)]
    wanted = schema.events_arrow()
    columns = dict(zip(["user_id", *FIELDS], zip(*rows, strict=True), strict=True))
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in wanted})


class Recomputed:
    """What is known of a user, and its scores by encoding them from scratch."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.table: Counter[Event] = Counter()
        self.sent: Counter[Event] = Counter()

    def history(self) -> tuple[list[Event], int]:
        """All events that count, and how many of them are kept no more."""
        log = in_order(self.table)
        num_cut = int(KEEP.first_index(np.int64(len(log))))
        cut_until = log[num_cut - 1][0] if num_cut else NO_EVENT_TS
        online = Counter({e: n for e, n in self.sent.items() if e[0] > cut_until})
        events = in_order(self.table | online)
        return events, int(KEEP.first_index(np.int64(len(events)))) if len(events) > len(log) else num_cut

    def score(self, user: int, request_ts: int) -> tuple[np.ndarray, int, bool]:
        events, num_cut = self.history()
        seen = [e for e in events if e[0] < request_ts]
        model = self._scorer.model
        start = int(model.windows.history_start(len(seen))) * model.windows.merge_size
        history = histories(user, seen, start)
        items = stable_keys(pa.array(CANDIDATES))
        assert self._scorer.items
        features = {"item_id": items, **self._scorer.items.lookup(items)}
        asked = Candidates(np.array([0, len(CANDIDATES)]), features)
        pool = pool_for(model, 1)
        outputs = score(model, pool, encoded(model, pool, history), np.array([request_ts]), asked)
        return to_scores(outputs, model.tasks)["label"], len(seen), start < num_cut


def histories(user: int, seen: list[Event], start: int) -> Histories:
    kept = columns_of(seen[start:])
    keys = {name: stable_keys(pa.array(kept[name], pa.string())) for name in ("item_id", "action", "category")}
    numbers = {name: np.array([v or 0 for v in kept[name]], np.float32) for name in ("price", "quantity")}
    return Histories(
        user_key_B=stable_keys(pa.array([user])),
        offsets_B1=np.array([0, len(seen) - start]),
        first_index_B=np.array([start]),
        prev_event_ts_B=np.array([seen[start - 1][0] if start else NO_EVENT_TS], np.int64),
        event_ts_E=np.array(kept["event_ts"], np.int64),
        features={**keys, **numbers},
    )


HOURS = st.integers(0, 40)
EVENTS = st.lists(st.builds(event, HOURS, st.integers(0, 2)), max_size=6)
WHO = st.sampled_from(USERS)
STEPS = st.one_of(
    st.tuples(st.just("table"), WHO, EVENTS, st.booleans()),
    st.tuples(st.just("events"), WHO, EVENTS),
    st.tuples(st.just("score"), WHO, EVENTS, HOURS),
    st.tuples(st.just("newest"), WHO, st.integers(1, 3)),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return build_world(tmp_path_factory.mktemp("online"))


def publish(world: Settings, tables: dict[int, Counter[Event]], version_id: str) -> None:
    path, schema = world.path("tables", "sequences"), world.event_schema
    version = publish_sequences(path, log_of(tables, schema), schema, KEEP, 3, 20, version_id)
    publish_catalogue(world, version)


@settings(max_examples=25, deadline=None)
@given(
    starting=st.lists(st.builds(event, HOURS, st.integers(0, 2)), min_size=1, max_size=90),
    steps=st.lists(STEPS, min_size=3, max_size=14),
    cache_bytes=st.sampled_from([1 << 30, 1 << 30, 30_000]),
)
def test_no_interleaving_of_tables_events_and_requests_changes_a_score(
    world: Settings, tmp_path_factory: pytest.TempPathFactory, starting: list[Event], steps: list[Any], cache_bytes: int
) -> None:
    mine = tiny_settings(tmp_path_factory.mktemp("run"))
    tables = {user: Counter(starting[user::2]) for user in USERS}
    tables[3] = Counter([event(0, 0)])  # so that the table is never empty
    publish(mine, tables, "v0")
    scorer = Scorer(checkpoint_path(world), mine.path("tables", "sequences"), cache_bytes, mine.path("tables", "items"))
    known = {user: Recomputed(scorer) for user in USERS}
    for user in USERS:
        known[user].table = tables[user].copy()
    newest = 41
    for number, (what, user, *rest) in enumerate(steps, 1):
        if what == "table":  # catches up with some of what was sent, and brings events nobody sent
            brought, catches_up = rest
            sent = known[user].sent if catches_up else Counter(in_order(known[user].sent)[::2])
            tables[user] = (tables[user] | sent) + Counter(brought)
            publish(mine, tables, f"v{number}")
            newer = scorer.newer_tables()
            assert newer
            scorer.move_to(newer)
            known[user].table = tables[user].copy()
        elif what == "events":
            known[user].sent |= Counter(rest[0])
            [outcome] = scorer.add_events([EventsRequest(user, columns_of(rest[0]))])
            assert isinstance(outcome, EventsResult)
        else:
            events, hour = ([event(newest, n) for n in range(rest[0])], newest + 1) if what == "newest" else rest
            newest += what == "newest"
            known[user].sent |= Counter(events)
            request_ts = START_MS + hour * HOUR_MS
            asked = ScoreRequest(user, CANDIDATES, request_ts=request_ts, events=columns_of(events))
            [result] = scorer.score([asked])
            wanted, num_events, is_cut = known[user].score(user, request_ts)
            if isinstance(result, UserError):
                assert is_cut, result
                continue
            assert isinstance(result, ScoreResult)
            assert result.num_events == num_events
            np.testing.assert_allclose(result.scores["label"], wanted, rtol=1e-5, atol=1e-7)
            assert scorer.cache.num_bytes <= cache_bytes


def scorer_of(world: Settings, device_bytes: int = 1 << 30, **limits: Any) -> Scorer:
    tables = world.path("tables", "sequences"), device_bytes, world.path("tables", "items")
    return Scorer(checkpoint_path(world), *tables, event_limits=EventLimits(**limits))


def ask(scorer: Scorer, user: int, hour: int, events: list[Event] | None = None) -> ScoreResult:
    sent = columns_of(events) if events else {}
    [result] = scorer.score([ScoreRequest(user, CANDIDATES, request_ts=START_MS + hour * HOUR_MS, events=sent)])
    assert isinstance(result, ScoreResult), result
    return result


LATER = 31 * 24  # hours after START_MS; the world's log ends before


def test_events_in_order_are_appended_without_a_look_at_the_table_and_late_ones_are_not(
    world: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(world)
    assert ask(scorer, 5, LATER).source == "load"
    with monkeypatch.context() as patched:
        patched.setattr(scorer.history, "read", lambda *_: pytest.fail("read the table"))
        first = ask(scorer, 5, LATER + 2, [event(LATER, 0)])
        assert (first.source, first.num_events) == ("append", 26)
        again = ask(scorer, 5, LATER + 2, [event(LATER, 0)])  # a repeated call
        assert (again.source, again.num_events) == ("hit", 26)
        [told] = scorer.add_events([EventsRequest(5, columns_of([event(LATER, 0), event(LATER + 3, 1)]))])
        assert told == EventsResult(2, 1)
        assert (ask(scorer, 5, LATER + 4).source, ask(scorer, 5, LATER + 4).num_events) == ("hit", 27)
    late = ask(scorer, 5, LATER + 4, [event(LATER - 1, 2)])
    assert (late.source, late.num_events, scorer.cache.counters.stale) == ("load", 28, 1)


def test_an_event_at_the_time_of_the_request_is_not_seen(world: Settings) -> None:
    scorer = scorer_of(world)
    now = ask(scorer, 5, LATER, [event(LATER - 1, 0), event(LATER, 1), event(LATER + 1, 1)])
    assert (now.num_events, now.last_event_ts) == (26, START_MS + (LATER - 1) * HOUR_MS)
    assert ask(scorer, 5, LATER + 1).num_events == 27


def test_newer_events_do_not_hide_an_older_one_that_a_state_lacks(world: Settings) -> None:
    scorer = scorer_of(world)
    assert ask(scorer, 5, LATER + 2, [event(LATER, 0), event(LATER + 4, 1)]).num_events == 26
    again = ask(scorer, 5, LATER + 2, [event(LATER + 8, 0)])
    assert (again.source, again.num_events) == ("hit", 26)
    assert [ask(scorer, 5, LATER + hour).num_events for hour in (6, 9)] == [27, 28]


def test_a_state_whose_growth_has_failed_is_made_anew(world: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be half-written: a request before the new event would be answered with what came after it."""
    scorer = scorer_of(world)
    before, append = ask(scorer, 5, LATER), scorer._engine.append

    def fails(*args: Any) -> None:
        append(*args)
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(scorer._engine, "append", fails)
        with pytest.raises(MemoryError):
            ask(scorer, 5, LATER + 2, [event(LATER, 0)])
    cache = scorer.cache
    assert (len(cache), cache.num_bytes, cache.pool.slots.used_units) == (0, 0, 0)
    again = ask(scorer, 5, LATER)
    assert (again.source, again.num_events) == ("load", 25)
    np.testing.assert_array_equal(again.scores["label"], before.scores["label"])


def test_an_event_no_younger_than_the_last_one_cut_from_the_table_is_left_out(world: Settings) -> None:
    events = random_events(world.event_schema, seed=0)
    times = events.filter(pa.compute.equal(events["user_id"], 9))["event_ts"].cast(pa.int64()).to_pylist()
    cut_until = times[int(KeepRule(40, 4).first_index(np.int64(81))) - 1]
    for ts, num_events in ((cut_until - 1, 81), (cut_until, 81), (cut_until + 1, 82)):
        late = (ts, *event(0, 0)[1:])
        assert ask(scorer_of(world), 9, LATER, [late]).num_events == num_events


def test_a_user_known_only_from_online_events_is_kept(world: Settings) -> None:
    scorer = scorer_of(world)
    assert ask(scorer, 10**6, LATER, [event(1, 0)]).num_events == 1
    assert ask(scorer, 10**6, LATER).source == "hit"


def test_copies_in_one_call_count_and_repeated_calls_do_not(world: Settings) -> None:
    scorer, twice = scorer_of(world), [event(LATER, 0)] * 2
    assert ask(scorer, 5, LATER + 1, twice).num_events == 27
    assert ask(scorer, 5, LATER + 1, twice[:1]).num_events == 27
    assert ask(scorer, 5, LATER + 1, [*twice, event(LATER, 0)]).num_events == 28


def test_a_users_oldest_arrivals_go_first_and_the_answer_is_that_of_what_is_left(world: Settings) -> None:
    scorer = scorer_of(world, max_user_events=8)
    for hour in range(8):
        ask(scorer, 5, LATER + 20, [event(LATER + hour, 0)])
    full = ask(scorer, 5, LATER + 20)
    assert full.num_events == 33
    less = ask(scorer, 5, LATER + 20, [event(LATER + 8, 0)])
    assert (less.num_events, scorer.online.counters.dropped) == (25 + 6, 3)
    np.testing.assert_allclose(
        less.scores["label"],
        ask(scorer_of(world), 5, LATER + 20, [event(LATER + hour, 0) for hour in range(3, 9)]).scores["label"],
        rtol=1e-5,
        atol=1e-7,
    )


def held_hours(scorer: Scorer, user: int = 5) -> list[int]:
    times = scorer.online.of([scorer.user_key(user)])["event_ts"].cast(pa.int64()).to_pylist()
    return sorted((time_ms - START_MS) // HOUR_MS - LATER for time_ms in times)


def test_taking_in_the_same_kept_events_again_changes_nothing_where_a_bound_is_reached(world: Settings) -> None:
    """Of a user the last arrivals stay, without a hole; what all users' bound has no room for does not come and go."""
    before, scorer = scorer_of(world), scorer_of(world, max_user_events=8)
    for hour in range(12):
        ask(before, 5, LATER + 30, [event(LATER + hour, 0)])
        if hour == 6:
            ask(scorer, 5, LATER + 30, [event(LATER + 20, 0)])
    kept = before.online.all()
    for sent in range(21, 26):
        scorer.online.restore(kept)
        hours, revision = held_hours(scorer), scorer.online.revision(scorer.user_key(5))
        assert len(hours) == 8
        of_kept = [hour for hour in hours if hour < 12]
        assert of_kept == list(range(12 - len(of_kept), 12))
        assert scorer.online.restore(kept) == {}
        assert scorer.online.revision(scorer.user_key(5)) == revision
        ask(scorer, 5, LATER + 30, [event(LATER + sent, 0)])


def test_kept_events_that_the_bound_of_all_users_has_no_room_for_drop_nothing(world: Settings) -> None:
    before, scorer = scorer_of(world), scorer_of(world)
    for user in (1, 5, 7):
        ask(before, user, LATER + 30, [event(LATER + hour, 0) for hour in range(20)])
    for user in (7, 9):
        ask(scorer, user, LATER + 30, [event(LATER + 20, 0)])
    scorer.online._limits = EventLimits(max_bytes=scorer.online.num_bytes + 100)
    revisions = [scorer.online.revision(scorer.user_key(user)) for user in (1, 5, 7, 9)]
    assert scorer.online.restore(before.online.all()) == {}
    assert [scorer.online.revision(scorer.user_key(user)) for user in (1, 5, 7, 9)] == revisions
    assert (scorer.online.counters.dropped, scorer.online.counters.restored) == (0, 0)


def test_the_memory_of_all_users_events_is_bounded_and_who_was_dropped_is_answered_without_them(
    world: Settings,
) -> None:
    scorer = scorer_of(world, max_bytes=40_000)
    for user in range(1, 9):
        assert ask(scorer, user, LATER + 1, [event(LATER, 0)]).num_events == user * user + 1
        assert scorer.online.num_bytes <= 40_000
    assert len(scorer.online) < 8
    assert ask(scorer, 1, LATER + 1).num_events == 1
    together = [
        ScoreRequest(
            user, CANDIDATES, request_ts=START_MS + (LATER + 3) * HOUR_MS, events=columns_of([event(LATER, 1)])
        )
        for user in range(1, 9)
    ]
    for user, result in enumerate(scorer.score(together), 1):
        assert isinstance(result, ScoreResult)
        held = len(scorer.online.of([int(stable_keys(pa.array([user]))[0])]))
        assert result.num_events == user * user + held


def test_of_a_bound_of_one_event_the_newest_stays(world: Settings) -> None:
    scorer = scorer_of(world, max_user_events=1)
    for hour in (LATER, LATER + 1, LATER + 2):
        scorer.add_events([EventsRequest(5, columns_of([event(hour, 0)]))])
        assert len(scorer.online) == 1


def test_events_of_a_log_whose_times_are_relative_are_taken_in_as_it_has_them(tmp_path: Path) -> None:
    """Seven hours after its beginning are a fine time there, and everywhere else a mistake of the unit."""
    relative = tiny_settings(tmp_path)
    rows = random_events(relative.event_schema, seed=0)
    times = pc.subtract(rows["event_ts"].cast(pa.int64()), START_MS).cast(rows["event_ts"].type)
    rows = rows.set_column(rows.column_names.index("event_ts"), "event_ts", times)
    publish_catalogue(relative, publish_of_world(relative, rows))
    publish_random_model(relative)
    sent = EventsRequest(1, {"event_ts": [7 * HOUR_MS], "item_id": ["item1"]})
    assert scorer_of(relative).add_events([sent]) == [EventsResult(1, 1)]


def test_events_that_come_together_are_each_their_own_requests(world: Settings) -> None:
    scorer, sent = (
        scorer_of(world),
        {5: [event(LATER, 0)] * 2, 6: [(-1, *event(0, 0)[1:])], 7: [], 8: [event(LATER, 1)]},
    )
    outcomes = scorer.score(
        [
            ScoreRequest(
                user,
                CANDIDATES,
                request_ts=START_MS + (LATER + 3) * HOUR_MS,
                events=columns_of(events) if events else {},
            )
            for user, events in sent.items()
        ]
    )
    assert str(outcomes[1]) == "events: event_ts before 1970: send events as the log will have them"
    num_events = [outcome.num_events for outcome in outcomes if isinstance(outcome, ScoreResult)]
    assert num_events == [25 + 2, 49, 64 + 1]


def test_events_expire(world: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, now_s = scorer_of(world, keep_s=10), 1000.0
    monkeypatch.setattr(online.time, "time", lambda: now_s)
    assert ask(scorer, 5, LATER + 2, [event(LATER, 0)]).num_events == 26
    now_s = 1005.0
    assert ask(scorer, 5, LATER + 2, [event(LATER + 1, 0)]).num_events == 27
    now_s = 1012.0
    assert ask(scorer, 5, LATER + 2).num_events == 26
    assert scorer.online.counters.expired == 1
    now_s = 1020.0
    assert ask(scorer, 5, LATER + 2).num_events == 25
    assert (len(scorer.online), scorer.online.num_bytes) == (0, 0)


def test_a_forgotten_user_has_no_state_and_no_events_here(world: Settings) -> None:
    scorer = scorer_of(world)
    ask(scorer, 5, LATER + 1, [event(LATER, 0)])
    assert scorer.forget(5)
    assert not scorer.forget(5)
    assert (len(scorer.cache), len(scorer.online)) == (0, 0)
    assert ask(scorer, 5, LATER + 1).num_events == 25


def test_events_of_a_user_who_was_asked_about_once_are_no_second_request(world: Settings) -> None:
    """What has been asked for again is protected from eviction: visitors who click would take all the room for it. Others come
    between, so that a second request would count."""
    scorer = scorer_of(world, device_bytes=50_000)
    for user in (5, 6, 7):
        ask(scorer, user, LATER)
    for hour in range(3):
        scorer.add_events([EventsRequest(5, columns_of([event(LATER + hour, 0)]))])
    held = scorer.cache._index.find(scorer.user_key(5))
    assert held is not None
    assert not held.asked_again
    assert held.entry.state.num_events == 28
    ask(scorer, 5, LATER + 3)
    assert held.asked_again


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"event_ts": [1], "item_id": ["a"], "secret": [1]},
            "events: unknown field: an event here has event_ts, item_id",
        ),
        ({"event_ts": [START_MS], "item_id": [None]}, "events: null item_id"),
        ({"event_ts": [START_MS], "item_id": [""]}, "events: empty item_id"),
        ({"event_ts": [None], "item_id": ["secret"]}, "events: missing or unparsable event_ts"),
        ({"event_ts": [2**42 * 1000], "item_id": ["secret"]}, "events: event_ts"),
        ({"event_ts": [START_MS // 1000], "item_id": ["secret"]}, "events: event_ts"),
        ({"event_ts": [START_MS], "item_id": [7]}, "events.item_id: expected string values"),
        ({"event_ts": [START_MS], "item_id": ["a"], "price": [1e39]}, "events.price: expected finite float values"),
    ],
)
def test_events_that_the_log_would_not_take_are_refused_whole(
    world: Settings, columns: dict[str, list[Any]], message: str
) -> None:
    scorer = scorer_of(world)
    [outcome] = scorer.add_events([EventsRequest(5, columns)])
    assert isinstance(outcome, UserError)
    assert str(outcome).startswith(message)
    assert "secret" not in str(outcome).replace("secret values", "")
    assert len(scorer.online) == 0


@settings(deadline=None)
@given(known=EVENTS, sent=EVENTS, is_known=st.booleans())
def test_what_is_beyond_is_the_difference_of_multisets(
    known: list[Event], sent: list[Event], is_known: bool, world: Settings
) -> None:
    schema, padding = world.event_schema, Counter([event(50, 0)])  # a log is never empty here
    other = padding if is_known else Counter([event(60, 0)])
    tables = [log_of({1: pad, 2: Counter(events)}, schema) for pad, events in ((padding, known), (other, sent))]
    difference = beyond(tables[1], tables[0], schema).select(FIELDS)
    times = difference["event_ts"].cast(pa.int64())
    found = Counter(zip(*[times.to_pylist(), *(c.to_pylist() for c in difference.columns[1:])], strict=True))
    assert found == Counter(sent) + (other - padding) - Counter(known)


def test_equal_events_that_are_new_together_stay_as_many_and_have_no_negative_zero(world: Settings) -> None:
    schema = world.event_schema
    time_ms, *rest, _ = event(50, 0)
    one = (time_ms, *rest, -0.0)
    sent = log_of({1: Counter({one: 2})}, schema)
    found = beyond(sent, sent.slice(0, 0), schema)
    assert len(found) == 2
    assert [math.copysign(1, number) for number in found[FIELDS[-1]].to_pylist()] == [1, 1]
