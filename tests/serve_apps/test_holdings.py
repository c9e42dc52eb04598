"""What a replica says of itself while its scorer rebuilds what it holds."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from longer.serving.scorer import ScoreRequest
from serve_apps.holdings import Ledger
from tests.serving.tables import START_MS, build_world
from tests.serving.test_dumps import scorer_of


def test_a_replica_tells_its_last_account_while_a_rollout_rebuilds_its_pools(tmp_path: Path) -> None:
    """The pools are not there for seconds then: looked at by the event loop, autoscaling and the status page would fail."""
    scorer, worker, may_go = scorer_of(build_world(tmp_path), device_states=9), ThreadPoolExecutor(1), threading.Event()

    async def in_worker(function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(worker, function, *args)

    def rebuild() -> None:
        pool = scorer.cache.pool
        del scorer.cache.pool
        assert may_go.wait(10)
        scorer.cache.pool = pool

    async def run() -> None:
        ledger = Ledger(scorer, in_worker)
        await in_worker(scorer.score, [ScoreRequest(5, ["item1"], request_ts=START_MS + 10**10)])
        assert (await ledger.look(10)).num_states == 1
        worker.submit(rebuild)
        worker.submit(scorer.forget, 5)
        held = await asyncio.gather(*(ledger.look(0.02) for _ in range(3)))
        assert [one.num_states for one in held] == [1] * 3
        may_go.set()
        await in_worker(scorer.score, [ScoreRequest(6, ["item1"], request_ts=START_MS + 10**10)])
        assert (await ledger.look(10)).num_states == 1  # not what the look that nobody waited for saw before
        await in_worker(scorer.forget, 6)
        assert (await ledger.look(10)).num_states == 0

    asyncio.run(run())
    worker.shutdown()
