"""What a replica brings back by itself, without Serve: whoever was forgotten stays so until she asks."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longer.serving.scorer import ScoreRequest
from serve_apps.affinity import Ring
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
    keeper, forgotten = StateKeeper(args, scorer, "me", in_worker), scorer.user_key(9)

    def is_held() -> bool:
        return scorer.cache.peek(forgotten, scorer.version) is not None

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
