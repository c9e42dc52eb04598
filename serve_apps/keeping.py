"""States that a replica starts with: what replicas before it left in dumps, and those of the most active users of the table.

All of it in the background, once the replica answers and knows who the others are, so that it takes what is its own by the ring.
Files and tables are read beside the worker thread, which takes in one file, or encodes a few users, between two batches of
requests. Only free room is filled: nothing goes for it that the model could answer from. It is done again when the ring, the dumps
or the model change.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from longer.serving.cache import StateVersion
from longer.serving.dumps import DumpCounters, StateDumps
from longer.serving.kept_states import KeptState
from longer.serving.pending import Pending, pending_users, read_rows
from longer.serving.scorer import Scorer
from serve_apps.affinity import Ring, session_of
from serve_apps.arguments import ScoringArgs

_WARMED_TOGETHER = 4
_MORE_THAN_A_SHARE = 1.5
"""Replicas own users unevenly: of so many times what all of them want, each finds enough of its own."""

_MOST_FORGOTTEN = 200_000
"""Users, of some 70 bytes each, of whom a replica remembers that nothing may be brought back; past it, it brings back nobody."""

_logger = logging.getLogger("ray.serve")

InWorker = Callable[..., Awaitable[Any]]


class StateKeeper:
    """Brings states to a replica, and leaves its states to others; `in_worker` runs what touches the scorer."""

    def __init__(self, args: ScoringArgs, scorer: Scorer, replica: str, in_worker: InWorker) -> None:
        self._args, self._scorer, self._replica, self._in_worker = args, scorer, replica, in_worker
        self._dumps = StateDumps(args.state_dump, replica) if args.state_dump else None
        self._brought: tuple[Any, ...] = ()
        self._lock = asyncio.Lock()
        self._read: set[tuple[StateVersion, str, int | str]] = set()
        self._forgotten: set[int] = set()
        self.num_warmed = 0

    @property
    def _brings(self) -> bool:
        return bool(self._dumps or self._args.warm_users)

    @property
    def _is_full(self) -> bool:
        return len(self._forgotten) >= _MOST_FORGOTTEN

    @property
    def counters(self) -> dict[str, int]:
        dumps = self._dumps.counters if self._dumps else DumpCounters()
        return {**dumps.as_dict(), "warmed": self.num_warmed}

    async def bring(self, ring: Ring) -> None:
        """Restores and warms this replica's users, unless that is under way or done for what is there now."""
        if self._lock.locked() or not self._brings or self._is_full:
            return
        async with self._lock:
            try:
                dumps = await asyncio.to_thread(self._dumps.names) if self._dumps else frozenset()
                wanted = (ring.replica_ids, dumps, self._scorer.version)
                self._read = {one for one in self._read if one[0] == self._scorer.version and one[1] in dumps}
                if wanted != self._brought:
                    await self._restore(ring)
                    await self._warm(ring)
                    self._brought = wanted
            except Exception:
                _logger.exception(
                    "states of before: not all could be brought back; they are encoded when they are asked for"
                )

    async def _restore(self, ring: Ring) -> None:
        if self._dumps is None:
            return
        version, layout = self._scorer.version, self._scorer.cache.layout

        def is_wanted(dump: str, user_id: int | str) -> bool:
            """Each state is read once, whatever becomes of it, though the ring may change often."""
            state = version, dump, user_id
            if state in self._read or not self._is_own(user_id, ring):
                return False
            asked_for.add(state)
            return True

        asked_for = set[tuple[StateVersion, str, int | str]]()
        files = self._dumps.states(version, layout, is_wanted)
        taken = set[int]()
        try:
            while (states := await asyncio.to_thread(_next, files)) is not None:
                taken |= (some := await self._in_worker(self._take_in, states, version))
                self._dumps.counters.restored += len(some)
                self._read |= asked_for  # what could not be read is asked for again
        finally:
            marked = await asyncio.to_thread(self._dumps.forgotten)  # some may be since the first file was read
            await self._in_worker(self._drop, marked & taken)
        if taken:
            _logger.info("%d states of before are back, in host memory", len(taken))

    def _is_own(self, user_id: int | str, ring: Ring) -> bool:
        return ring.owner(session_of(user_id)) == self._replica

    def _take_in(self, states: list[KeptState], version: StateVersion) -> set[int]:
        """Keys of the users whose states are here from now on; none if the model is another by now."""
        cache = self._scorer.cache
        return {
            one.user_key
            for one in states
            if self._scorer.version == version
            and not self._is_full
            and one.user_key not in self._forgotten
            and cache.restore(one.user_key, version, one.entry, one.words_NI, one.is_protected)
        }

    def _drop(self, user_keys: set[int]) -> None:
        for user_key in user_keys:
            self._scorer.cache.forget(user_key)

    async def _warm(self, ring: Ring) -> None:
        wanted = self._args.warm_users
        most = round(wanted * len(ring.replica_ids) * _MORE_THAN_A_SHARE)
        if not most:
            return
        active = await asyncio.to_thread(self._scorer.history.most_active, most)
        own = [n for n, user_id in enumerate(active.to_pylist()) if self._is_own(user_id, ring)][:wanted]
        users = active.take(pa.array(own, pa.int64()))
        marked = await asyncio.to_thread(self._dumps.forgotten) if self._dumps else frozenset[int]()
        for begin in range(0, len(users), _WARMED_TOGETHER):
            some = await self._in_worker(self._scorer.warmable, pending_users(users[begin : begin + _WARMED_TOGETHER]))
            await asyncio.to_thread(read_rows, self._scorer.history, some)
            self.num_warmed += await self._in_worker(self._encode, some, marked)

    def _encode(self, users: Sequence[Pending], marked: frozenset[int]) -> int:
        """How many of the users have been encoded: of those who were forgotten nothing is made before they ask."""
        if self._is_full:
            return 0
        return self._scorer.warm([one for one in users if one.user_key not in self._forgotten | marked])

    async def mark_forgotten(self, user_id: int | str) -> None:
        """No dump brings the user back; to be done before replicas drop what they hold."""
        if self._dumps:
            await asyncio.to_thread(self._dumps.forget, self._scorer.user_key(user_id))

    def forget(self, user_id: int | str) -> bool:
        """Drops what the replica holds of the user, and brings nothing of hers here any more; whether it held anything."""
        user_key = self._scorer.user_key(user_id)
        if self._brings and not self._is_full:
            self._forgotten.add(user_key)
        return self._scorer.forget(user_id)

    async def leave(self) -> None:
        """Dumps the replica's states for those after it."""
        if self._dumps is None:
            return
        try:
            args = self._scorer.cache, self._scorer.version, self._args.state_dump_s
            num_states = await self._in_worker(self._dumps.write, *args)
            _logger.info("%d states dumped to %s", num_states, self._args.state_dump)
        except Exception:
            _logger.exception("states could not be dumped to %s", self._args.state_dump)


def _next(files: Iterator[list[KeptState]]) -> list[KeptState] | None:
    return next(files, None)
