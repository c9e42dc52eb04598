"""Going over to another checkpoint without a request lost, one roll-out at a time; one that is refused is tried again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from longer.errors import one_line
from longer.serving.scorer import Scorer
from serve_apps.arguments import Rollout

_logger = logging.getLogger("ray.serve")


class Rollouts:
    """The checkpoint that was asked for last, and whether it serves.

    It is loaded beside the scorer and taken over in the scorer's thread (`in_worker`), between two batches. While it cannot serve,
    the model that does goes on.
    """

    def __init__(
        self,
        scorer: Scorer,
        in_worker: Callable[..., Awaitable[Any]],
        warm_ups: Callable[[Scorer], Iterator[Callable[[], None]]],
    ) -> None:
        self._scorer, self._in_worker, self._warm_ups = scorer, in_worker, warm_ups
        self._lock = asyncio.Lock()
        self._wanted: dict[str, Any] | None = None
        self.is_refused = self._may_be_mended = False

    async def ask(self, user_config: dict[str, Any]) -> None:
        """Goes over to the checkpoint of a `user_config`. Of several asked for at once, the last one serves in the end."""
        self._wanted = user_config
        async with self._lock:
            if self._wanted is user_config:
                await self._try(user_config)

    async def retry(self) -> None:
        """Tries the checkpoint again that was refused, if it is still wanted: its files may have been put right since."""
        if self._may_be_mended and self._wanted is not None and not self._lock.locked():
            await self.ask(self._wanted)

    async def _try(self, user_config: dict[str, Any]) -> None:
        """A model that loads but finds no room is not tried again by itself: each try costs all states that are held."""
        version, self._may_be_mended = self._scorer.info.model_version, True
        try:
            checkpoint = Rollout.model_validate(user_config).checkpoint
            loaded = await asyncio.to_thread(self._scorer.load_checkpoint, checkpoint)
            self._may_be_mended = False
            await self._in_worker(self._scorer.adopt, *loaded)
        except Exception as error:  # whatever it is, raising would end this replica and its states
            self.is_refused = True
            again = "; it is tried again" if self._may_be_mended else ""
            _logger.error("roll-out refused, model %s serves on%s: %s", version, again, one_line(error))
        else:
            self.is_refused = False
            _logger.info("model: now %s", self._scorer.info.model_version)
        if not self._may_be_mended:
            await self._warm()

    async def _warm(self) -> None:
        """The model that serves from now on, or the old one in memory that is new to it."""
        try:
            for warm_up in self._warm_ups(self._scorer):  # between batches: requests wait for one at a time
                await self._in_worker(warm_up)
        except Exception:
            _logger.exception("model %s serves, but its first batches will be slow", self._scorer.info.model_version)
