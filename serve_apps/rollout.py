"""Going over to another checkpoint without a request lost, one roll-out at a time; one that is refused is tried again."""

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from longer.errors import one_line
from longer.model.longer import Longer
from longer.serving.scorer import Scorer
from longer.training.checkpoints import CheckpointInfo
from serve_apps.arguments import Rollout
from serve_apps.keeping import InWorker

_logger = logging.getLogger("ray.serve")


class Rollouts:
    """The checkpoint that was asked for last, and whether it serves; `first` is the one that the scorer has started with.

    It is loaded beside the scorer, taken over in the scorer's thread (`in_worker`) between two batches, and tried there before any
    request is scored with it. While it cannot serve, the model that does goes on. So what a replica serves would depend on when it
    was started: one that cannot begin with what is asked for begins with what its peers serve (`ask_peers`: paths of checkpoints).
    """

    def __init__(
        self,
        scorer: Scorer,
        first: str,
        in_worker: InWorker,
        warm_ups: Callable[[Scorer], Iterator[Callable[[], None]]],
        ask_peers: Callable[[], Awaitable[list[str]]],
    ) -> None:
        self._scorer, self._first, self._in_worker = scorer, first, in_worker
        self._warm_ups, self._ask_peers = warm_ups, ask_peers
        self._lock = asyncio.Lock()
        self._wanted: dict[str, Any] = {"checkpoint": first}
        self._has_begun = False
        self.checkpoint = first
        """The one that serves."""
        self.is_refused = self._may_be_mended = False

    async def ask(self, user_config: dict[str, Any] | None) -> None:
        """Goes over to the checkpoint of a `user_config`, None to the first one. Of several asked for at once, the last one serves.

        What was asked for last is not tried again: Serve repeats it when a replica's rank changes.
        """
        begins, self._has_begun = not self._has_begun, True
        wanted = user_config or {"checkpoint": self._first}
        if wanted == self._wanted:
            return
        self._wanted = wanted
        async with self._lock:
            if self._wanted is wanted:
                await self._try(wanted)
                if self.is_refused and begins:
                    await self._follow_peers()

    async def retry(self) -> None:
        """Tries the checkpoint again that was refused, if it is still wanted: its files may have been put right since."""
        if self._may_be_mended and not self._lock.locked():
            async with self._lock:
                await self._try(self._wanted)

    async def _try(self, user_config: dict[str, Any]) -> None:
        """A model that loads but cannot compute, or finds no room, is not tried again by itself: each try costs states."""
        version, self._may_be_mended = self._scorer.info.model_version, True
        try:
            checkpoint = Rollout.model_validate(user_config).checkpoint
            if checkpoint != self.checkpoint:
                loaded = await self._load(checkpoint)
                self._may_be_mended = False
                await self._go_over(checkpoint, *loaded)
        except Exception as error:  # whatever it is, raising would end this replica and its states
            self.is_refused = True
            again = "; it is tried again" if self._may_be_mended else ""
            _logger.error("roll-out refused, model %s serves on%s: %s", version, again, one_line(error))
        else:
            self.is_refused = self._may_be_mended = False

    async def _load(self, checkpoint: str) -> tuple[Longer, CheckpointInfo]:
        return await asyncio.to_thread(self._scorer.load_checkpoint, checkpoint)

    async def _go_over(self, checkpoint: str, model: Longer, info: CheckpointInfo) -> None:
        try:
            await self._in_worker(self._take_over, model, info)
            self.checkpoint = checkpoint
            _logger.info("model: now %s", info.model_version)
        finally:
            await self._warm()

    def _take_over(self, model: Longer, info: CheckpointInfo) -> None:
        """Adopts the model, or takes the one before back where it cannot even do its first warm-up: no request comes between."""
        gc.unfreeze()  # what goes now is to be found
        before = self._scorer.model, self._scorer.info
        self._scorer.adopt(model, info)
        try:
            next(self._warm_ups(self._scorer))()
        except Exception:
            self._scorer.adopt(*before)
            raise

    async def _warm(self) -> None:
        """The model that serves from now on, or the old one in memory that is new to it."""
        try:
            for warm_up in self._warm_ups(self._scorer):  # between batches: requests wait for one at a time
                await self._in_worker(warm_up)
        except Exception:
            _logger.exception("model %s serves, but its first batches will be slow", self._scorer.info.model_version)

    async def _follow_peers(self) -> None:
        """What most of those who run serve; alone, or if that cannot serve here either, the first one."""
        served = Counter(await self._ask_peers()).most_common(1)
        if not served:
            return
        try:
            if (checkpoint := served[0][0]) != self.checkpoint:
                await self._go_over(checkpoint, *await self._load(checkpoint))
        except Exception as error:
            _logger.error("the model that the other replicas serve cannot serve here: %s", one_line(error))
