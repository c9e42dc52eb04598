"""Newer versions of the tables, and the held states brought up to date with them, beside the calls.

Tables are opened beside the worker thread, which only goes over to them. Then the users who are held are looked at again, those who
were asked for last first: their rows are read by a few threads, so many users at a time, and the worker takes in a few between two
batches of requests. Who asks before it is her turn is answered as ever, by a read of her own.
"""

import asyncio
import logging

import pyarrow as pa

from longer.serving.pending import pending_users, read_rows
from longer.serving.scorer import Scorer
from serve_apps.keeping import InWorker

_READ_TOGETHER = 64
"""Users whose rows are in memory at a time: of 10,000 events each, some 50 MB."""
_NUM_THREADS = 4
_TAKEN_IN_TOGETHER = 4

_logger = logging.getLogger("ray.serve")


class NewerTables:
    """Goes over to them, and looks at the held users again; `in_worker` runs what touches the scorer."""

    def __init__(self, scorer: Scorer, in_worker: InWorker) -> None:
        self._scorer, self._in_worker = scorer, in_worker
        self._looked_at = scorer.history.version_id

    async def move(self) -> None:
        """Goes over to newer tables, if there are any."""
        try:
            if newer := await asyncio.to_thread(self._scorer.newer_tables):
                await self._in_worker(self._scorer.move_to, newer)
                _logger.info("sequences: now at version %s", self._scorer.history.version_id)
        except Exception:
            _logger.exception(
                "sequences: cannot look for a newer version; version %s serves on", self._scorer.history.version_id
            )

    async def look_again(self) -> None:
        """Brings the held states up to date with tables that have moved since; where they move meanwhile, to be begun again."""
        history = self._scorer.history
        if (version_id := history.version_id) == self._looked_at:
            return
        try:
            user_ids = await self._in_worker(self._scorer.held_of_other_tables)
            for begin in range(0, len(user_ids), _READ_TOGETHER):
                if history.version_id != version_id:
                    return
                await self._look_at(user_ids[begin : begin + _READ_TOGETHER])
            self._looked_at = version_id
            _logger.info("sequences: %d held users looked at again", len(user_ids))
        except Exception:
            _logger.exception(
                "sequences: not all held users could be looked at again; they are when they are asked for, or next time"
            )

    async def _look_at(self, user_ids: pa.Array) -> None:
        users = pending_users(user_ids)
        buckets = self._scorer.history.buckets([user.user_key for user in users])
        parts = [
            [user for user, bucket in zip(users, buckets, strict=True) if bucket % _NUM_THREADS == part]
            for part in range(_NUM_THREADS)
        ]
        await asyncio.gather(*(asyncio.to_thread(read_rows, self._scorer.history, part) for part in parts if part))
        found = [user for user in users if user.row]
        for begin in range(0, len(found), _TAKEN_IN_TOGETHER):
            await self._in_worker(self._scorer.bring_up_to_date, found[begin : begin + _TAKEN_IN_TOGETHER])
        if not found and users[0].error:  # it is not one bucket that is damaged
            raise users[0].error
