"""What a replica runs, whole, against the float64 reference: on a GPU compiled and captured, most of it in bf16."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from longer.arrays import Candidates
from longer.hashing import stable_keys
from longer.model import captured_call
from longer.model.captured_call import CapturedCall, Graphs
from longer.model.outputs import to_scores
from longer.model.state_layout import Precision
from longer.serving.scorer import EventsRequest, Scorer, ScoreRequest, ScoreResult
from longer.training.checkpoints import load_appendable
from tests.model.reference import reference_outputs
from tests.model.tolerances import OF_TESTED_MODELS as SHORTENED
from tests.serving.tables import START_MS, build_world, checkpoint_path, tiny_settings
from tests.serving.test_online import CANDIDATES, HOUR_MS, Event, columns_of, event, histories, in_order, publish

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="has no GPU")
USERS = (1, 2, 3, 4)
MOST_DIFFERENCE: dict[str, dict[Precision, float]] = {
    "cpu": {"float32": 1e-5, **SHORTENED},
    "cuda": {"float32": 1e-5, "bf16": 0.01, "int8": 0.01, "fp8": 0.01},
}
"""Of a probability, from the float64 reference; on a GPU all but float32 multiply in bf16 too."""


class Replica:
    """A scorer with room for two states on the device and one in host memory, and what is true of its users."""

    def __init__(self, root: Path, precision: Precision, device: str) -> None:
        checkpoint, settings = checkpoint_path(build_world(root / "world")), tiny_settings(root / "mine")
        self.events = {user: Counter(event(2 * hour + user, hour % 3) for hour in range(9 + user)) for user in USERS}
        publish(settings, self.events, "v1")
        tables = [settings.path("tables", name) for name in ("sequences", "items")]
        loaded, _ = load_appendable(checkpoint, "cpu")
        self.exact, self.hour = loaded.double(), 40
        state_bytes = Scorer(checkpoint, tables[0], 0, state_precision=precision).cache.most_state_bytes
        self.scorer = Scorer(
            checkpoint,
            tables[0],
            2 * state_bytes,
            tables[1],
            device=device,
            host_bytes=state_bytes,
            state_precision=precision,
        )

    def act(self, user: int, num_events: int) -> dict[str, list[Any]]:
        """What the user does next, to send."""
        new = [event(self.hour, kind) for kind in range(num_events)]
        self.hour += 1
        self.events[user] |= Counter(new)
        return columns_of(new)

    def differences(self, *users: int, sent: dict[str, list[Any]] | None = None) -> Iterator[tuple[str, float]]:
        """Where each user's state came from, and how far its scores are from the reference's; the first brings events."""
        request_ts = START_MS + self.hour * HOUR_MS
        asked = [ScoreRequest(user, CANDIDATES, request_ts=request_ts) for user in users]
        asked[0] = replace(asked[0], events=sent or {})
        for user, result in zip(users, self.scorer.score(asked), strict=True):
            assert isinstance(result, ScoreResult), result
            yield result.source, float(np.abs(result.scores["label"] - self.wanted(user, request_ts)).max())

    def wanted(self, user: int, request_ts: int) -> np.ndarray:
        items = stable_keys(pa.array(CANDIDATES))
        assert self.scorer.items
        asked = Candidates(np.array([0, len(CANDIDATES)]), {"item_id": items, **self.scorer.items.lookup(items)})
        whole = histories(user, in_order(self.events[user]), 0)
        outputs = reference_outputs(self.exact, whole, np.array([request_ts]), asked)
        return to_scores(outputs, self.exact.tasks)["label"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("precision", ["float32", *SHORTENED])
def test_a_replica_answers_as_the_reference_whatever_it_runs(tmp_path: Path, precision: Precision, device: str) -> None:
    """Slow on a GPU: all is compiled and captured, as nowhere else in the tests. Windows move every four events."""
    replica, found = Replica(tmp_path, precision, device), list[tuple[str, float]]()
    found += replica.differences(*USERS)
    for number in range(6):
        user, other = (1, 2) if number % 2 else (2, 1)
        replica.scorer.add_events([EventsRequest(user, replica.act(user, 1 + number % 3))])
        found += replica.differences(other, user, sent=replica.act(other, 2))
        found += replica.differences(USERS[number % 4])
    counters = replica.scorer.cache.counters
    assert {source for source, _ in found} == {"load", "append", "hit"}
    assert min(counters.evict, counters.demote, counters.promote) > 0
    assert 0 < max(difference for _, difference in found) <= MOST_DIFFERENCE[device][precision]


def graphs_of(replica: Replica) -> list[CapturedCall]:
    return [call for graphs in replica.scorer._engine._graphs for call in graphs._calls.values()]


def num_found(events: Iterable[Event], calls: list[CapturedCall]) -> int:
    """How many times of these events stand in what graphs were given."""
    own_ts = np.array(sorted({ts for ts, *_ in events}))
    buffers = [buffer.cpu().numpy() for call in calls for buffer in (call._host, call._device)]
    return sum(int(np.isin(buffer.view(np.int64), own_ts).sum()) for buffer in buffers)


@ON_GPU
def test_nothing_of_a_user_who_is_forgotten_is_left_in_what_graphs_were_given(tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):
        replica = Replica(tmp_path, "float32", "cuda")
        list(replica.differences(*USERS))
        list(replica.differences(1, sent=replica.act(1, 3)))
        calls = graphs_of(replica)
        assert num_found(replica.events[1], calls) > 0
        assert replica.scorer.forget(1)
        assert num_found(replica.events[1], calls) == 0
        for _, difference in replica.differences(2, 3):
            assert difference <= MOST_DIFFERENCE["cuda"]["float32"]


@ON_GPU
def test_nothing_of_a_user_is_left_in_the_graphs_of_a_model_that_is_replaced(tmp_path: Path) -> None:
    """Who is forgotten later is looked for in the graphs that are there then."""
    with torch.compiler.set_stance("force_eager"):
        replica = Replica(tmp_path, "float32", "cuda")
        list(replica.differences(*USERS))
        calls = graphs_of(replica)
        assert num_found(replica.events[1], calls) > 0
        replica.scorer.adopt(replica.scorer.model, replica.scorer.info)
        assert num_found(replica.events[1], calls) == 0


@ON_GPU
def test_nothing_that_a_graph_was_given_is_left_when_others_take_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_call, "MAX_GRAPHS", 1)
    sevens = {"x": np.full(8, 7)}
    with torch.inference_mode():
        graphs = Graphs[str](torch.device("cuda"), torch.cuda.graph_pool_handle())
        first = graphs.of("first", lambda tensors: tensors["x"] + 1, lambda: {"x": np.zeros(8, np.int64)})
        assert first(sevens).tolist() == [8] * 8
        graphs.of("second", lambda tensors: tensors["x"] + 2, lambda: {"x": np.zeros(8, np.int64)})
        assert list(graphs.sizes) == ["second"]
        assert not first._host.any()
        assert not first._device.any()


@ON_GPU
def test_a_batch_of_a_new_size_is_scored_by_a_larger_graph_as_the_reference_does(tmp_path: Path) -> None:
    """To capture one while it waits would take many times as long."""
    with torch.compiler.set_stance("force_eager"):
        replica = Replica(tmp_path, "float32", "cuda")
        list(replica.differences(1, 2))
        _, of_scores = replica.scorer._engine._graphs
        captured = set(of_scores.sizes)
        for user in (3, 4, 1):
            [(_, difference)] = replica.differences(user)
            assert difference <= MOST_DIFFERENCE["cuda"]["float32"]
        assert set(of_scores.sizes) == captured
