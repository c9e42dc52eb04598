"""A checkpoint that cannot serve never does, and one that is put right does without being asked for again."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longer.config import Settings
from longer.errors import UserError
from longer.serving.scorer import Scorer
from longer.training.checkpoints import load_model, save_model
from serve_apps.arguments import ScoringArgs, resolved
from serve_apps.rollout import Rollouts
from tests.serving.tables import build_world, checkpoint_path, publish_random_model


@pytest.fixture
def world(tmp_path: Path) -> Settings:
    return build_world(tmp_path)


def scorer_of(world: Settings, checkpoint: str) -> Scorer:
    return Scorer(checkpoint, world.path("tables", "sequences"), 1 << 20, world.path("tables", "items"))


class Rolling:
    """A scorer and its roll-outs; `adopted` are the versions that it went over to, in order."""

    def __init__(self, world: Settings) -> None:
        self.first = checkpoint_path(world)
        self.scorer, self.adopted, self.num_warm_ups = scorer_of(world, self.first), list[str](), 0
        self.rollouts = Rollouts(self.scorer, self.in_worker, self.warm_ups)

    async def in_worker(self, function: Callable[..., Any], *args: Any) -> Any:
        result = await asyncio.to_thread(function, *args)
        if function == self.scorer.adopt:
            self.adopted.append(self.scorer.info.model_version)
        return result

    def warm_ups(self, scorer: Scorer) -> Iterator[Callable[[], None]]:
        self.num_warm_ups += 1
        return scorer.warm_ups(2, 3)


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
        assert (rollouts.is_refused, rolling.scorer.info.model_version) == (True, before)
        weights.write_bytes(whole)
        await rollouts.retry()
        assert (rollouts.is_refused, rolling.scorer.info.model_version) == (False, load_model(second)[1].model_version)
        await rollouts.ask({"checkpoint": "nowhere"})
        await rollouts.ask({"checkpoint": rolling.first})
        await rollouts.retry()
        assert (rollouts.is_refused, rolling.scorer.info.model_version) == (False, before)

    asyncio.run(run())
    assert rolling.num_warm_ups == len(rolling.adopted) == 2


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
        assert (rolling.rollouts.is_refused, rolling.scorer.info.model_version) == (True, before)
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
    save_model(broken, model, info.model, info.schema, info.tasks)
    with pytest.raises(UserError, match="not finite"):
        scorer_of(world, broken)
    with pytest.raises(UserError, match="not finite"):  # told before a replica starts
        resolved(ScoringArgs(checkpoint=broken, sequences=world.path("tables", "sequences")))
    rolling = Rolling(world)
    asyncio.run(rolling.rollouts.ask({"checkpoint": broken}))
    assert (rolling.rollouts.is_refused, rolling.adopted) == (True, [])
