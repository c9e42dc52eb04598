"""A checkpoint that cannot serve never does, and one that is put right does without being asked for again."""

import asyncio
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longer.config import Settings
from longer.errors import UserError
from longer.model.longer import Longer
from longer.serving.scorer import Scorer, ScoreRequest, ScoreResult
from longer.training.checkpoints import CheckpointInfo, load_model, save_weights, weights_of
from serve_apps.arguments import ScoringArgs, resolved
from serve_apps.rollout import Rollouts
from tests.serving.tables import START_MS, build_world, checkpoint_path, publish_random_model


@pytest.fixture
def world(tmp_path: Path) -> Settings:
    return build_world(tmp_path)


def scorer_of(world: Settings, checkpoint: str) -> Scorer:
    return Scorer(checkpoint, world.path("tables", "sequences"), 1 << 20, world.path("tables", "items"))


class Rolling:
    """A scorer and its roll-outs; `adopted` are the versions that it went over to, in order, and `peers` what others serve."""

    def __init__(self, world: Settings, peers: Sequence[str] = ()) -> None:
        self.first, self.peers = checkpoint_path(world), list(peers)
        self.scorer, self.num_loads, self.num_warm_ups = scorer_of(world, self.first), 0, 0
        self.adopted, self._worker = list[str](), ThreadPoolExecutor(1)
        self._adopt, self._load_checkpoint = self.scorer.adopt, self.scorer.load_checkpoint
        self.scorer.adopt, self.scorer.load_checkpoint = self.adopt, self.load_checkpoint  # type: ignore[method-assign]
        self.rollouts = Rollouts(self.scorer, self.first, self.in_worker, self.warm_ups, self.ask_peers)

    def adopt(self, model: Longer, info: CheckpointInfo) -> None:
        self._adopt(model, info)
        self.adopted.append(info.model_version)

    def load_checkpoint(self, path: str) -> tuple[Longer, CheckpointInfo]:
        self.num_loads += 1
        return self._load_checkpoint(path)

    async def in_worker(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    def warm_ups(self, scorer: Scorer) -> Iterator[Callable[[], None]]:
        self.num_warm_ups += 1
        return scorer.warm_ups(2, 3)

    async def ask_peers(self) -> list[str]:
        return self.peers

    @property
    def serves(self) -> tuple[bool, str]:
        """Whether what was asked for is refused, and the model that scores."""
        return self.rollouts.is_refused, self.scorer.info.model_version


def version_of(checkpoint: str) -> str:
    return load_model(checkpoint)[1].model_version


def test_a_model_that_loads_but_cannot_compute_never_scores_a_request(world: Settings) -> None:
    """Adopted for good, it would answer every request with an error, on every replica."""
    rolling, second = Rolling(world), publish_random_model(world, seed=1).path
    before, seen = rolling.scorer.info.model_version, list[ScoreResult | UserError]()
    at_ms = START_MS + 10**10
    [held] = rolling.scorer.score([ScoreRequest(5, ["item1"], request_ts=at_ms)])

    def load_broken(path: str) -> tuple[Longer, CheckpointInfo]:
        model, info = load_model(path)
        model.candidates = lambda *_: 1 / 0  # type: ignore[method-assign]
        return model, info

    rolling.scorer.load_checkpoint = load_broken  # type: ignore[method-assign]

    async def run() -> None:
        rolling_out = asyncio.ensure_future(rolling.rollouts.ask({"checkpoint": second}))
        while not rolling_out.done():  # between whatever else the scorer's thread does
            seen.extend(await rolling.in_worker(rolling.scorer.score, [ScoreRequest(5, ["item1"], request_ts=at_ms)]))
        await rolling.rollouts.retry()

    asyncio.run(run())
    assert rolling.adopted == [version_of(second), before]  # once: each try costs states
    assert rolling.serves == (True, before)
    assert isinstance(held, ScoreResult)
    assert seen
    for result in seen:
        assert isinstance(result, ScoreResult)
        assert result.source == "hit"  # what was held of users is still there
        np.testing.assert_array_equal(result.scores["label"], held.scores["label"])


def test_without_user_config_replicas_go_back_to_the_checkpoint_of_the_arguments(world: Settings) -> None:
    rolling, second = Rolling(world), publish_random_model(world, seed=1).path

    async def run() -> None:
        await rolling.rollouts.ask({"checkpoint": second})
        assert rolling.serves == (False, version_of(second))
        await rolling.rollouts.ask(None)

    asyncio.run(run())
    assert rolling.serves == (False, version_of(rolling.first))


def test_a_replica_that_starts_with_a_refused_checkpoint_serves_what_its_peers_do_and_alone_the_first(
    world: Settings,
) -> None:
    """Else a replica that is replaced would go back two models, among replicas that serve the last good one."""
    second = publish_random_model(world, seed=1).path
    among_others, alone = Rolling(world, [second, checkpoint_path(world), second]), Rolling(world)
    for rolling, serves in ((among_others, second), (alone, alone.first)):
        asyncio.run(rolling.rollouts.ask({"checkpoint": "nowhere"}))
        assert rolling.serves == (True, version_of(serves))
    mended = Rolling(world, [second])
    asyncio.run(mended.rollouts.ask(None))
    asyncio.run(mended.rollouts.ask({"checkpoint": "nowhere"}))  # one that runs keeps what it has
    assert mended.serves == (True, version_of(mended.first))


def test_what_serves_already_is_not_loaded_again_when_a_rank_changes_or_at_the_start(world: Settings) -> None:
    """Under load, loading and capturing again would cost every user of the replica time, for nothing."""
    rolling, second = Rolling(world), publish_random_model(world, seed=1).path

    async def run() -> None:
        for user_config in (None, {"checkpoint": rolling.first}, None):
            await rolling.rollouts.ask(user_config)
        assert (rolling.num_loads, rolling.num_warm_ups) == (0, 0)
        for _ in range(3):
            await rolling.rollouts.ask({"checkpoint": second})
        assert rolling.num_loads == 1
        for _ in range(3):
            await rolling.rollouts.ask({"checkpoint": "nowhere"})
        assert rolling.num_loads == 2
        await rolling.rollouts.ask({"checkpoint": second})
        assert rolling.num_loads == 2

    asyncio.run(run())
    assert rolling.serves == (False, version_of(second))


def test_a_refused_checkpoint_is_tried_again_until_it_serves_or_another_is_wanted(
    world: Settings, tmp_path: Path
) -> None:
    rolling, second = Rolling(world), publish_random_model(world, seed=1).path
    arriving = tmp_path / "arriving"
    shutil.copytree(second, arriving)
    weights = arriving / "model.safetensors"
    whole = weights.read_bytes()
    rollouts, before = rolling.rollouts, rolling.scorer.info.model_version

    async def run() -> None:
        weights.write_bytes(whole[:-9])
        await rollouts.ask({"checkpoint": str(arriving)})
        await rollouts.retry()
        assert rolling.serves == (True, before)
        weights.write_bytes(whole)
        await rollouts.retry()
        assert rolling.serves == (False, version_of(second))
        await rollouts.ask({"checkpoint": "nowhere"})
        await rollouts.ask({"checkpoint": rolling.first})
        await rollouts.retry()
        assert rolling.serves == (False, before)

    asyncio.run(run())
    assert len(rolling.adopted) == 2


def test_a_model_that_finds_no_room_is_not_tried_again_by_itself(world: Settings) -> None:
    """Each try gives the states that are held back first: tried every minute, the model that serves would never have a hit."""
    rolling, second = Rolling(world), publish_random_model(world, seed=1).path
    before, tries = rolling.scorer.info.model_version, 0

    def no_room(*_: Any) -> None:
        nonlocal tries
        tries += 1
        raise MemoryError("no room")

    rolling.scorer.adopt = no_room  # type: ignore[method-assign]

    async def run() -> None:
        await rolling.rollouts.ask({"checkpoint": second})
        await rolling.rollouts.retry()
        assert rolling.serves == (True, before)
        await rolling.rollouts.ask(None)
        await rolling.rollouts.ask({"checkpoint": second})

    asyncio.run(run())
    assert tries == 2


def test_of_rollouts_asked_for_at_once_the_last_one_serves(world: Settings) -> None:
    paths = [publish_random_model(world, seed=seed).path for seed in (1, 2, 3)]
    rolling = Rolling(world)

    async def run() -> None:
        await asyncio.gather(*(rolling.rollouts.ask({"checkpoint": path}) for path in paths))

    asyncio.run(run())
    assert rolling.adopted[-1] == rolling.scorer.info.model_version == load_model(paths[-1])[1].model_version
    assert not rolling.rollouts.is_refused


def test_weights_that_are_not_finite_are_refused_at_the_start_and_at_a_rollout(world: Settings, tmp_path: Path) -> None:
    model, info = load_model(checkpoint_path(world))
    with torch.no_grad():
        model.norm_head.weight[0] = np.nan
    broken = str(tmp_path / "nan")
    save_weights(broken, weights_of(model), info.model, info.schema, info.tasks)
    with pytest.raises(UserError, match="not finite"):
        scorer_of(world, broken)
    with pytest.raises(UserError, match="not finite"):  # told before a replica starts
        resolved(ScoringArgs(checkpoint=broken, sequences=world.path("tables", "sequences")))
    rolling = Rolling(world)
    asyncio.run(rolling.rollouts.ask({"checkpoint": broken}))
    assert (rolling.rollouts.is_refused, rolling.adopted) == (True, [])
