"""Whatever happens to a replica, in whatever order and batches, a score is that of the history recomputed in plain Python.

Tables that catch up or lose events, events sent online, forgetting, other models and back, restarts from dumps, warm-up, budgets
from nothing to plenty in both tiers, and batches in which users come several times.
"""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch

from longer.errors import UserError
from longer.serving import scorer as scorer_module
from longer.serving.dumps import StateDumps
from longer.serving.pending import pending_users, read_rows
from longer.serving.scorer import EventsRequest, Scorer, ScoreRequest, ScoreResult, Scoring
from longer.training_settings import TaskSettings
from tests.serving import test_online
from tests.serving.restarts import restore
from tests.serving.tables import START_MS, build_world, checkpoint_path, publish_random_model, tiny_settings
from tests.serving.test_online import CANDIDATES, HOUR_MS, Event, Recomputed, columns_of, event, in_order, publish

USERS = (1, 2, 4, 5)
BUDGETS = ((0, 0), (9_000, 0), (0, 12_000), (9_000, 12_000), (9_000, 40_000), (1 << 30, 0), (3_000, 5_000))
"""Bytes on the device and in host memory; a state of these worlds takes some thousands in float32."""
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-7}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}


class Request(NamedTuple):
    user: int
    request_ts: int
    events: list[Event]

    def as_sent(self) -> ScoreRequest:
        return ScoreRequest(self.user, CANDIDATES, request_ts=self.request_ts, events=columns_of(self.events))


class Life:
    """A replica, and what is true of its users."""

    def __init__(self, rng: random.Random, checkpoints: list[str], root: Path, device: str, dtype: torch.dtype) -> None:
        self.rng, self.root, self.settings, self.device, self.dtype = rng, root, tiny_settings(root), device, dtype
        self.checkpoints = list(checkpoints)
        self.budget = tuple(num_bytes * dtype.itemsize // 4 for num_bytes in rng.choice(BUDGETS))
        self.newest_hour, self.num_versions = 41, 0
        self.tables = {user: Counter(self.some_event() for _ in range(rng.randint(0, 60))) for user in USERS}
        self.tables[3] = Counter([event(0, 0)])  # a table is never empty
        self.publish()
        self.scorer = self.started()
        self.known = {user: Recomputed(self.scorer) for user in USERS}
        for user in USERS:
            self.known[user].table = self.tables[user].copy()

    def some_event(self) -> Event:
        return event(self.rng.randint(0, self.newest_hour), self.rng.randint(0, 2))

    def started(self) -> Scorer:
        tables = [self.settings.path("tables", name) for name in ("sequences", "items")]
        scorer = Scorer(
            self.checkpoints[0],
            tables[0],
            self.budget[0],
            tables[1],
            device=self.device,
            host_bytes=self.budget[1],
            state_precision="float64" if self.dtype == torch.float64 else "float32",
        )
        scorer.adopt(scorer.model.to(self.dtype), scorer.info)
        return scorer

    def publish(self) -> None:
        self.num_versions += 1
        publish(
            self.settings, {user: events for user, events in self.tables.items() if events}, f"v{self.num_versions}"
        )

    # -- what happens -------------------------------------------------------------------------------------------------

    def table(self) -> None:
        """Catches up with some or all that was sent, brings events that nobody sent, or has lost every second one."""
        user = self.rng.choice(USERS)
        sent = self.known[user].sent
        brought = Counter(self.some_event() for _ in range(self.rng.randint(0, 4)))
        self.tables[user] = (self.tables[user] | Counter(in_order(sent)[:: self.rng.choice((1, 2))])) + brought
        if self.rng.random() < 0.15:
            self.tables[user] = Counter(in_order(self.tables[user])[::2])
        self.publish()
        newer = self.scorer.newer_tables()
        assert newer
        self.scorer.move_to(newer)
        self.known[user].table = self.tables[user].copy()

    def events(self) -> None:
        user, events = self.rng.choice(USERS), [self.some_event() for _ in range(self.rng.randint(1, 5))]
        self.known[user].sent |= Counter(events)
        self.scorer.add_events([EventsRequest(user, columns_of(events))])

    def forget(self) -> None:
        user = self.rng.choice(USERS)
        self.scorer.forget(user)
        assert self.scorer.cache.peek(self.scorer.user_key(user), self.scorer.version) is None
        self.known[user].sent = Counter()

    def adopt(self) -> None:
        self.checkpoints.reverse()
        model, info = self.scorer.load_checkpoint(self.checkpoints[0])
        self.scorer.adopt(model.to(self.dtype), info)

    def restart(self) -> None:
        """What was sent comes back with the states, or is lost though they come back; some may be sent anew before."""
        folder = str(self.root / f"dump{self.num_versions}_{self.rng.random()}")
        StateDumps(folder, "before").write(self.scorer.cache, self.scorer.online, self.scorer.version, 60)
        self.scorer, is_lost = self.started(), self.rng.random() < 0.3
        for known in self.known.values():
            known._scorer, known.sent = self.scorer, Counter() if is_lost else known.sent
        if self.rng.random() < 0.5:
            self.rng.choice((self.events, self.ask_now))()
        dumps, version, layout = StateDumps(folder, "after"), self.scorer.version, self.scorer.cache.layout
        if not is_lost:
            restore(dumps, self.scorer)
            return
        for _, states in dumps.states(dumps.listed(), version, layout, lambda *_: True):
            for one in states:
                self.scorer.restore(one, None)

    def ask_now(self) -> None:
        """Before what was sent is back: the answer lacks it."""
        request = Request(self.rng.choice(USERS), START_MS + self.newest_hour * HOUR_MS, [])
        self.scorer.score([request.as_sent()])

    def warm(self) -> None:
        self.scorer.warm(pending_users(pa.array(USERS)))

    def look_again(self) -> None:
        users = pending_users(self.scorer.held_of_other_tables())
        read_rows(self.scorer.history, users)
        self.scorer.bring_up_to_date(users)

    def some_request(self, user: int) -> Request:
        if self.rng.random() < 0.4:
            events = [event(self.newest_hour, kind) for kind in range(self.rng.randint(0, 5))]
            self.newest_hour += 1
            hour = self.newest_hour
        else:
            events = [self.some_event() for _ in range(self.rng.choice((0, 0, 2)))]
            hour = self.rng.randint(0, self.newest_hour + 1)
        return Request(user, START_MS + hour * HOUR_MS, events)

    def ask(self) -> None:
        """Several requests at once, of the past too; a user's are answered in order."""
        asked = [self.some_request(self.rng.choice(USERS)) for _ in range(self.rng.randint(1, 7))]
        for one, result in zip(asked, self.scorer.score([one.as_sent() for one in asked]), strict=True):
            self.known[one.user].sent |= Counter(one.events)
            self.check(one, result)

    def ask_slowly(self) -> None:
        """Other things happen before or after a row is read for a request, and before it is used."""
        asked = [self.some_request(user) for user in self.rng.sample(USERS, self.rng.randint(1, 3))]
        for one in asked:
            self.known[one.user].sent |= Counter(one.events)
        scorings = [Scoring(one.as_sent()) for one in asked]
        unread = self.scorer.attempt(scorings)
        told = [one.outcome is not None for one in scorings]
        self.check_all(asked, scorings, told)
        if self.rng.random() < 0.7:
            read_rows(self.scorer.history, unread)
        for what in self.rng.sample([self.table, self.events, self.forget, self.adopt, self.look_again, self.ask], 2):
            what()
        while unread := self.scorer.attempt(scorings):
            read_rows(self.scorer.history, unread)
        self.check_all(asked, scorings, [not is_told for is_told in told])

    def check_all(self, asked: list[Request], scorings: list[Scoring], are_told: list[bool]) -> None:
        for one, scoring, is_told in zip(asked, scorings, are_told, strict=True):
            if is_told:
                assert scoring.outcome is not None
                self.check(one, scoring.outcome)

    def check(self, asked: Request, result: ScoreResult | UserError) -> None:
        wanted, num_events, is_cut = self.known[asked.user].score(asked.user, asked.request_ts)
        if isinstance(result, UserError):
            assert is_cut, result
            return
        assert result.num_events == num_events
        np.testing.assert_allclose(result.scores["label"], wanted, **CLOSE[self.dtype])

    def check_bytes(self) -> None:
        cache = self.scorer.cache
        assert cache.num_bytes <= self.budget[0]
        assert cache.host_bytes <= self.budget[1]
        assert cache.pool.slots.used_units * cache.layout.row_bytes == cache.num_bytes


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    world = build_world(tmp_path_factory.mktemp("world"))
    return [checkpoint_path(world), publish_random_model(world, seed=1).path]


def live(
    seed: int, checkpoints: list[str], root: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    rng = random.Random(seed)
    life = Life(rng, checkpoints, root, device, dtype)
    happens = [life.table, life.events, life.forget, life.adopt, life.restart, life.warm, life.look_again]
    happens += [life.ask, life.ask_slowly]
    for what in rng.choices(happens, weights=(12, 8, 8, 6, 6, 5, 8, 35, 20), k=20):
        what()
        life.check_bytes()


@pytest.mark.parametrize("seed", range(8))
def test_no_mixture_of_what_happens_to_a_replica_changes_a_score(
    seed: int, checkpoints: list[str], tmp_path: Path
) -> None:
    live(seed, checkpoints, tmp_path)


@pytest.mark.parametrize("seed", range(100, 106))
def test_no_mixture_of_what_happens_to_a_replica_shows_in_float64(
    seed: int, checkpoints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event that is missed or doubled among many may hide in what float32 rounds. Answers are float32: these are not rounded."""

    def unrounded(outputs_CT: np.ndarray, tasks: Sequence[TaskSettings]) -> dict[str, np.ndarray]:
        assert outputs_CT.dtype == np.float64
        return {tasks[0].name: torch.from_numpy(outputs_CT[:, 0]).sigmoid().numpy()}

    for room in (scorer_module, test_online):
        monkeypatch.setattr(room, "to_scores", unrounded)
    live(seed, checkpoints, tmp_path, dtype=torch.float64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs, pinned memory and copies beside them need a GPU")
@pytest.mark.parametrize("seed", range(4))
def test_no_mixture_of_what_happens_to_a_replica_on_a_gpu_changes_a_score(
    seed: int, checkpoints: list[str], tmp_path: Path
) -> None:
    """Slow: each engine captures its graphs anew; compiled, as replicas run them, they are tested by test_replica.py."""
    with torch.compiler.set_stance("force_eager"):
        live(seed, checkpoints, tmp_path, "cuda")
