"""What a replica starts with: states and online events that replicas before it left in dumps, and states of the most active users
of the table.

All of it in the background, once the replica answers and knows who the others are, so that it takes what is its own by the ring.
Files and tables are read beside the worker thread, which takes in one file's states, or some users' events, or encodes a few
users, between two batches of requests. Events come first: nobody else has them, and states are true that hold the same. Only free
room is filled: nothing goes for it that the model could answer from. It is done again when the ring, the dumps or the model change.
What all replicas have brought is removed.
Dumps are looked for as often as the keeper is asked to while a replica that has left the ring may still dump; else each minute.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic
from typing import Any

import pyarrow as pa

from longer.hashing import stable_keys
from longer.ring import Ring, session_of
from longer.serving.cache import StateVersion
from longer.serving.dumps import DumpCounters, Listing, StateDumps
from longer.serving.kept_states import KeptState
from longer.serving.pending import Pending, pending_users, read_rows
from longer.serving.scorer import Scorer
from serve_apps.arguments import ScoringArgs

_WARMED_TOGETHER = 4
_MORE_THAN_A_SHARE = 1.5
"""Replicas own users unevenly: of so many times what all of them want, each finds enough of its own."""

_LOOK_EVERY_S = 60.0
"""A listing of the folder reads the names of all its files, and all replicas do it."""

_MOST_FORGOTTEN = 200_000
"""Users, of some 70 bytes each, of whom a replica remembers that nothing may be brought back; past it, it brings back nobody."""

_logger = logging.getLogger("ray.serve")

InWorker = Callable[..., Awaitable[Any]]
Revisions = dict[str, dict[int, int]]
"""By dump and user key, what the dump's events of the user are known by here (`OnlineEvents.restore`)."""


class StateKeeper:
    """Brings states to a replica, and leaves its states to others; `in_worker` runs what touches the scorer."""

    def __init__(self, args: ScoringArgs, scorer: Scorer, replica: str, in_worker: InWorker) -> None:
        self._args, self._scorer, self._replica, self._in_worker = args, scorer, replica, in_worker
        self._dumps = StateDumps(args.state_dump, replica) if args.state_dump else None
        self._brought: tuple[Any, ...] = ()
        self._seen: tuple[Any, ...] = ()
        self._often_until_s = self._next_look_s = 0.0
        self._lock = asyncio.Lock()
        self._read: set[tuple[StateVersion, str, int | str]] = set()
        self._forgotten: set[int] = set()
        self._taken: set[int] = set()
        self._marked_s: dict[int, float] = {}
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
        if self._lock.locked() or not self._brings or not self._is_due(ring):
            return
        async with self._lock:
            self._next_look_s, began_s = 0.0, monotonic()
            try:
                listing = await asyncio.to_thread(self._dumps.listed) if self._dumps else Listing({}, {})
                await self._drop_forgotten(listing.forgotten_s)
                wanted = (ring.replica_ids, listing.names, self._scorer.version)
                self._read = {one for one in self._read if one[0] == self._scorer.version and one[1] in listing.names}
                if wanted != self._brought:
                    if not self._is_full:
                        await self._restore(listing, ring)
                        await self._warm(ring)
                    self._brought = wanted
                if self._dumps:
                    self._dumps.done(listing)
                if began_s >= self._often_until_s:
                    self._next_look_s = began_s + _LOOK_EVERY_S
                if self._dumps:
                    await asyncio.to_thread(self._dumps.remove_old, listing)
            except Exception:
                _logger.exception(
                    "states and events of before: not all could be brought back, or removed when all replicas had them; what is "
                    "missing is tried again, and states are encoded when they are asked for"
                )

    def _is_due(self, ring: Ring) -> bool:
        """Whether there may be something new; a replica that has left the ring ends, and is dumped, some time later."""
        if (seen := (ring.replica_ids, self._scorer.version)) != self._seen:
            self._seen, self._often_until_s = seen, monotonic() + self._args.stop_within_s
        return monotonic() < self._often_until_s or monotonic() >= self._next_look_s

    async def _restore(self, listing: Listing, ring: Ring) -> None:
        if self._dumps is None:
            return
        try:
            revisions = await self._restore_events(self._dumps, listing, ring)
            await self._restore_states(self._dumps, listing, ring, revisions)
        finally:
            await self._drop_forgotten(await asyncio.to_thread(self._dumps.forgotten.times_s))

    async def _drop_forgotten(self, marked_s: dict[int, float]) -> None:
        """Drops who was forgotten while she was taken in. Whoever was taken in stays known until then, so that an error only
        puts it off."""
        since = {key for key, forgotten_s in marked_s.items() if self._marked_s.get(key) != forgotten_s}
        if forgotten := since & self._taken:
            await self._in_worker(self._drop, forgotten)
        self._taken, self._marked_s = set(), marked_s

    async def _restore_events(self, dumps: StateDumps, listing: Listing, ring: Ring) -> Revisions:
        """Of users of whom exactly a dump's events are known now, the revision.

        All are read each time: who has them already takes none in.
        """
        revisions: Revisions = {}
        files = dumps.events(listing, self._scorer.version.schema_hash, lambda user_id: self._is_own(user_id, ring))
        while found := await asyncio.to_thread(next, files, None):
            dump, events = found
            exactly = await self._in_worker(self._take_in_events, events)
            revisions.setdefault(dump, {}).update(exactly)
        return revisions

    async def _restore_states(self, dumps: StateDumps, listing: Listing, ring: Ring, revisions: Revisions) -> None:
        version = self._scorer.version
        asked_for = set[tuple[StateVersion, str, int | str]]()

        def is_wanted(dump: str, user_id: int | str) -> bool:
            """Each state is read once, whatever becomes of it, though the ring may change often."""
            state = version, dump, user_id
            if state in self._read or not self._is_own(user_id, ring):
                return False
            asked_for.add(state)
            return True

        num_before = dumps.counters.restored
        files = dumps.states(listing, version, self._scorer.cache.layout, is_wanted)
        while found := await asyncio.to_thread(next, files, None):
            dump, states = found
            dumps.counters.restored += await self._in_worker(self._take_in, states, version, revisions.get(dump, {}))
            self._read |= asked_for  # what could not be read is asked for again
        if num_restored := dumps.counters.restored - num_before:
            _logger.info("%d states of before are back, in host memory", num_restored)

    def _is_own(self, user_id: int | str, ring: Ring) -> bool:
        return ring.owner(session_of(user_id)) == self._replica

    def _take_in_events(self, events: pa.Table) -> dict[int, int]:
        """The revision of the users of whom exactly these are known from now on; of no forgotten user."""
        if self._is_full:
            return {}
        user_keys = stable_keys(events["user_id"]).tolist()
        events = events.filter(pa.array([user_key not in self._forgotten for user_key in user_keys], pa.bool_()))
        self._taken |= set(user_keys) - self._forgotten
        return self._scorer.online.restore(events)

    def _take_in(self, states: list[KeptState], version: StateVersion, revisions: Mapping[int, int]) -> int:
        """How many users' states are here from now on; none if the model is another by now."""
        taken = {
            one.user_key
            for one in states
            if self._scorer.version == version
            and not self._is_full
            and one.user_key not in self._forgotten
            and self._scorer.restore(one, revisions.get(one.user_key))
        }
        self._taken |= taken
        return len(taken)

    def _drop(self, user_keys: set[int]) -> None:
        for user_key in user_keys:
            self._scorer.forget_key(user_key)

    async def _warm(self, ring: Ring) -> None:
        wanted = self._args.warm_users
        most = round(wanted * len(ring.replica_ids) * _MORE_THAN_A_SHARE)
        if not most:
            return
        active = await asyncio.to_thread(self._scorer.history.most_active, most)
        own = [n for n, user_id in enumerate(active.to_pylist()) if self._is_own(user_id, ring)][:wanted]
        users = active.take(pa.array(own, pa.int64()))
        for begin in range(0, len(users), _WARMED_TOGETHER):
            some = await self._in_worker(self._scorer.warmable, pending_users(users[begin : begin + _WARMED_TOGETHER]))
            await asyncio.to_thread(read_rows, self._scorer.history, some)
            self.num_warmed += await self._in_worker(self._encode, some, set(self._marked_s))

    def _encode(self, users: Sequence[Pending], marked: set[int]) -> int:
        """How many of the users have been encoded: of those who were forgotten nothing is made before they ask."""
        if self._is_full:
            return 0
        return self._scorer.warm([one for one in users if one.user_key not in self._forgotten | marked])

    async def mark_forgotten(self, user_id: int | str) -> None:
        """No dump brings the user back; to be done before replicas drop what they hold."""
        if self._dumps:
            await asyncio.to_thread(self._dumps.forgotten.mark, self._scorer.user_key(user_id))

    def forget(self, user_id: int | str) -> bool:
        """Drops what the replica holds of the user, and brings nothing of hers here any more; whether it held anything."""
        user_key = self._scorer.user_key(user_id)
        if self._brings and not self._is_full:
            self._forgotten.add(user_key)
        return self._scorer.forget_key(user_key)

    async def leave(self) -> None:
        """Dumps the replica's states, and the events that were sent to it, for those after it."""
        if self._dumps is None:
            return
        try:
            args = self._scorer.cache, self._scorer.online, self._scorer.version, self._args.state_dump_s
            num_states = await self._in_worker(self._dumps.write, *args)
            num_users = self._dumps.counters.dumped_event_users
            _logger.info("%d states and events of %d users dumped to %s", num_states, num_users, self._args.state_dump)
        except Exception:
            _logger.exception("states and events could not be dumped to %s", self._args.state_dump)
