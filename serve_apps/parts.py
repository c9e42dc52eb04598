"""Batches in parts: each request is scored by the replica whose user it is, where her state is, or is looked for the next time."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import TypeVar

from longer.ring import session_of
from longer.serving.requests import ScoreRequest
from serve_apps.access_log import Call
from serve_apps.affinity import Affinity
from serve_apps.peers import Peers

T = TypeVar("T")
Score = Callable[[list[ScoreRequest]], Awaitable[list[T]]]


class Parts:
    """Has parts of at most `most_waiting` calls at a time scored by other replicas: a call that waits for them has a place on its
    own replica, and were all places taken by such, replicas would wait for each other."""

    def __init__(self, affinity: Affinity, peers: Peers, most_waiting: int) -> None:
        self._affinity, self._peers, self._waiting = affinity, peers, asyncio.Semaphore(most_waiting)

    async def score(self, requests: Sequence[ScoreRequest], here: Score[T], there: Score[T], call: Call) -> list[T]:
        """One outcome a request, in order: of `there`, a method of the replica whose user it is, if she is not this one's and it
        answers in half of what is left of the call's time; else of `here`, and then she is counted as astray."""
        within_s = call.left_s / 2
        places = dict[str, list[int]]()
        for place, request in enumerate(requests):
            places.setdefault(self._affinity.owner(request.user_id), []).append(place)
        parts = [[requests[place] for place in its] for its in places.values()]
        waits = not self._waiting.locked() and any(not self._affinity.is_own(part[0].user_id) for part in parts)
        async with self._waiting if waits else nullcontext():
            outcomes = await asyncio.gather(
                *(self._score_part(part, here, there if waits else None, within_s) for part in parts)
            )
        of_place = dict(zip(chain(*places.values()), chain(*outcomes), strict=True))
        return [of_place[place] for place in range(len(requests))]

    async def _score_part(
        self, part: list[ScoreRequest], here: Score[T], there: Score[T] | None, within_s: float
    ) -> list[T]:
        user_id = part[0].user_id
        if there and not self._affinity.is_own(user_id):
            told = await self._peers.ask_owner(session_of(user_id), there, part, within_s=within_s)
            if told is not None:
                return told
        return await self.answer(part, here)

    async def answer(self, part: list[ScoreRequest], here: Score[T]) -> list[T]:
        """What `here` makes of the part; then, whoever sent it, users who are another replica's are counted as astray: of a part
        that is given up on meanwhile, who answers it instead counts them."""
        outcomes = await here(part)
        for request in part:
            self._affinity.count(request.user_id, has_session=True)
        return outcomes
