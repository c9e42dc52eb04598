"""What a replica looks for now and then, beside its calls: who the others are, newer tables, and a checkpoint that was refused."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from longer.serving.scorer import Scorer
from serve_apps.affinity import Affinity
from serve_apps.keeping import StateKeeper
from serve_apps.rollout import Rollouts

_logger = logging.getLogger("ray.serve")


class Upkeep:
    """Looks at the ring each time that it is told to, and for the rest every `refresh_s` seconds. Nothing is begun again before it
    has ended, and nobody waits for it."""

    def __init__(
        self,
        scorer: Scorer,
        affinity: Affinity,
        keeper: StateKeeper,
        rollouts: Rollouts,
        in_worker: Callable[..., Awaitable[Any]],
        ask_names: Callable[[], Awaitable[list[str]]],
        refresh_s: float,
    ) -> None:
        self._scorer, self._affinity, self._keeper, self._rollouts = scorer, affinity, keeper, rollouts
        self._in_worker, self._ask_names, self._refresh_s = in_worker, ask_names, refresh_s
        self._refreshed_s = time.monotonic()
        self._under_way = dict[str, asyncio.Future[None]]()

    def begin(self) -> None:
        """Of the event loop."""
        works = [self._look_at_ring]
        if time.monotonic() - self._refreshed_s >= self._refresh_s:
            self._refreshed_s = time.monotonic()
            works += [self._bring_states, self._refresh_tables, self._rollouts.retry]
        for work in works:
            if (last := self._under_way.get(work.__name__)) is None or last.done():
                self._under_way[work.__name__] = asyncio.ensure_future(work())

    async def _look_at_ring(self) -> None:
        before, names = self._affinity.ring, await self._ask_names()
        if names:  # else the ring stays what it was
            self._affinity.see(names)
        if self._affinity.ring and (before is None or before.replica_ids != self._affinity.ring.replica_ids):
            await self._bring_states()

    async def _bring_states(self) -> None:
        if self._affinity.ring:
            await self._keeper.bring(self._affinity.ring)

    async def _refresh_tables(self) -> None:
        """Tables are read beside the worker, which only goes over to them."""
        try:
            if newer := await asyncio.to_thread(self._scorer.newer_tables):
                await self._in_worker(self._scorer.move_to, newer)
                _logger.info("sequences: now at version %s", self._scorer.history.version_id)
        except Exception:
            _logger.exception(
                "sequences: cannot look for a newer version; version %s serves on", self._scorer.history.version_id
            )
