"""What a replica looks for now and then, beside its calls: who the others are, what those who have stopped left, newer tables, and
a checkpoint that was refused."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from serve_apps.affinity import Affinity
from serve_apps.keeping import StateKeeper
from serve_apps.newer_tables import NewerTables
from serve_apps.rollout import Rollouts

_LOOK_S, _LOOK_WITHIN_S, _FIRST_LOOK_WITHIN_S = 1.0, 0.2, 2.0


class Upkeep:
    """Looks for replicas that have come or gone, and for states that are theirs to bring, each time that it is told to, and for
    the rest every `refresh_s` seconds. Nothing is begun again before it has ended, and nobody waits for it."""

    def __init__(
        self,
        tables: NewerTables,
        affinity: Affinity,
        keeper: StateKeeper,
        rollouts: Rollouts,
        ask_urls: Callable[[], Awaitable[list[tuple[str, str | None] | BaseException]]],
        refresh_s: float,
    ) -> None:
        self._tables, self._affinity, self._keeper, self._rollouts = tables, affinity, keeper, rollouts
        self._ask_urls, self._refresh_s = ask_urls, refresh_s
        self._refreshed_s, self._looked_s = time.monotonic(), -math.inf
        self._under_way = dict[str, asyncio.Future[None]]()

    def begin(self) -> None:
        """Of the event loop."""
        works = [self._look_at_ring]
        if time.monotonic() - self._refreshed_s >= self._refresh_s:
            self._refreshed_s = time.monotonic()
            works += [self._refresh_tables, self._rollouts.retry]
        for work in works:
            self._begin(work)

    async def look(self) -> None:
        """Who the others are is known as of the last second afterwards, if they can be asked at once; else as of the last time."""
        if time.monotonic() - self._looked_s >= _LOOK_S:
            self._begin(self._look_at_ring)
            within_s = _LOOK_WITHIN_S if self._affinity.ring else _FIRST_LOOK_WITHIN_S
            await asyncio.wait([self._under_way[self._look_at_ring.__name__]], timeout=within_s)

    def _begin(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if (last := self._under_way.get(work.__name__)) is None or last.done():
            self._under_way[work.__name__] = asyncio.ensure_future(work())

    async def _look_at_ring(self) -> None:
        told = await self._ask_urls()
        self._looked_s = time.monotonic()
        if urls := dict(one for one in told if not isinstance(one, BaseException)):  # else the ring stays what it was
            is_one_silent = any(isinstance(one, TimeoutError) for one in told)  # it may be well again soon
            self._affinity.see({**self._affinity.urls, **urls} if is_one_silent else urls)
        self._begin(self._bring)

    async def _bring(self) -> None:
        """May take minutes: the ring is looked at meanwhile."""
        if self._affinity.ring:
            await self._keeper.bring(self._affinity.ring)

    async def _refresh_tables(self) -> None:
        await self._tables.move()
        self._begin(self._tables.look_again)
