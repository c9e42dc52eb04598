"""Parts of a batch come back in order, wherever they were scored, and replicas do not wait for each other in a ring."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from longer.ring import session_of
from longer.serving.requests import ScoreRequest
from serve_apps.access_log import Call
from serve_apps.affinity import Affinity
from serve_apps.parts import Parts

USERS = range(40)


class Others:
    """Peers that answer when they are told to, if they do."""

    def __init__(self, answers: bool = True) -> None:
        self.answers, self.goes_on, self.num_asked, self.asked = (
            answers,
            asyncio.Event(),
            0,
            list[tuple[str, list[int]]](),
        )

    async def ask_owner(
        self, session: str, method: Callable[..., Any], part: list[ScoreRequest], within_s: float
    ) -> list[str] | None:
        self.num_asked += 1
        self.asked.append((session, [int(request.user_id) for request in part]))
        await self.goes_on.wait()
        try:
            return await asyncio.wait_for(method(part), within_s) if self.answers else None
        except TimeoutError:
            return None


async def here(part: list[ScoreRequest]) -> list[str]:
    return [f"{request.user_id} here" for request in part]


async def there(part: list[ScoreRequest]) -> list[str]:
    return [f"{request.user_id} there" for request in part]


def affinity_of(*others: str) -> Affinity:
    affinity = Affinity("me")
    affinity.see(dict.fromkeys(others))
    return affinity


def a_call(timeout_s: float = 2, since_s: float = 0) -> Call:
    return Call("score:batch", timeout_s, time.perf_counter() - since_s)


REQUESTS = [ScoreRequest(user, ["item1"]) for user in USERS]


def test_each_owner_is_asked_once_for_all_its_users_and_answers_are_in_order() -> None:
    affinity, others = affinity_of("you", "they"), Others()
    others.goes_on.set()
    told = asyncio.run(Parts(affinity, others, 4).score(REQUESTS, here, there, a_call()))  # type: ignore[arg-type]
    own = [affinity.is_own(user) for user in USERS]
    assert told == [f"{user} {'here' if is_own else 'there'}" for user, is_own in zip(USERS, own, strict=True)]
    assert len(others.asked) == 2
    for session, users in others.asked:
        assert session == session_of(users[0])
        assert len({affinity.owner(user) for user in users}) == 1
    assert affinity.lost["other_replica"] == 0


def test_what_an_owner_does_not_answer_is_scored_here_and_counted() -> None:
    affinity, others = affinity_of("you"), Others(answers=False)
    others.goes_on.set()
    told = asyncio.run(Parts(affinity, others, 4).score(REQUESTS, here, there, a_call()))  # type: ignore[arg-type]
    assert told == [f"{user} here" for user in USERS]
    assert affinity.lost["other_replica"] == sum(not affinity.is_own(user) for user in USERS) > 0


def test_calls_that_wait_for_others_leave_places_to_what_others_ask_of_this_one() -> None:
    """Were all places of two replicas taken by calls that wait for the other one, none would end before its time is over."""
    affinity, others = affinity_of("you"), Others()
    parts = Parts(affinity, others, 2)  # type: ignore[arg-type]

    async def run() -> list[str]:
        calls = [asyncio.ensure_future(parts.score(REQUESTS, here, there, a_call())) for _ in range(5)]
        while sum(call.done() for call in calls) < 3:
            await asyncio.sleep(0)
        assert others.num_asked == 2
        others.goes_on.set()
        return [outcome for call in calls for outcome in await call]

    told = asyncio.run(run())
    num_others = sum(not affinity.is_own(user) for user in USERS)
    assert sum(outcome.endswith("there") for outcome in told) == 2 * num_others
    assert affinity.lost["other_replica"] == 3 * num_others


def test_all_parts_of_a_call_go_to_their_owners_however_many_they_are() -> None:
    """A call takes one place of its replica, whatever it waits for."""
    affinity, others = affinity_of("you", "they", "others"), Others()

    async def run() -> list[str]:
        asyncio.get_running_loop().call_later(0.05, others.goes_on.set)
        return await Parts(affinity, others, 1).score(REQUESTS, here, there, a_call())  # type: ignore[arg-type]

    told = asyncio.run(run())
    assert [outcome.endswith(" here") for outcome in told] == [affinity.is_own(user) for user in USERS]
    assert (others.num_asked, affinity.lost["other_replica"]) == (3, 0)


def test_a_part_that_a_full_owner_hands_to_another_replica_is_counted_there_as_astray() -> None:
    """Else states that are made where nobody looks for them would not show."""
    affinity, others, full = affinity_of("you", "third"), Others(), Affinity("third")
    full.see({"me": None, "you": None})
    others.goes_on.set()
    third = Parts(full, others, 4)  # type: ignore[arg-type]
    on_third = partial(third.answer, here=there)
    told = asyncio.run(Parts(affinity, others, 4).score(REQUESTS, here, on_third, a_call()))  # type: ignore[arg-type]
    assert [outcome.endswith(" here") for outcome in told] == [affinity.is_own(user) for user in USERS]
    assert affinity.lost["other_replica"] == 0
    assert full.lost["other_replica"] == sum(affinity.owner(user) == "you" for user in USERS) > 0


def test_a_part_that_was_given_up_on_is_counted_once_by_the_replica_that_answers_it() -> None:
    affinity, others, slow = affinity_of("you"), Others(), Affinity("third")
    slow.see({"me": None, "you": None})
    others.goes_on.set()

    async def never(part: list[ScoreRequest]) -> list[str]:
        await asyncio.Event().wait()
        return await there(part)

    on_third = partial(Parts(slow, others, 4).answer, here=never)  # type: ignore[arg-type]
    told = asyncio.run(Parts(affinity, others, 4).score(REQUESTS, here, on_third, a_call(0.1)))  # type: ignore[arg-type]
    assert told == [f"{user} here" for user in USERS]
    assert slow.lost["other_replica"] == 0
    assert affinity.lost["other_replica"] == sum(not affinity.is_own(user) for user in USERS) > 0


def test_a_call_whose_body_came_slowly_is_still_answered_where_its_owners_are_silent() -> None:
    """Half of the whole time, waited for after most of it has gone, leaves none to score the parts here."""
    affinity, others = affinity_of("you"), Others()
    others.goes_on.set()

    async def never(_: list[ScoreRequest]) -> list[str]:
        await asyncio.Event().wait()
        return []

    async def run() -> list[str]:
        call = a_call(timeout_s=10, since_s=9.6)
        async with asyncio.timeout(call.left_s):
            return await Parts(affinity, others, 4).score(REQUESTS, here, never, call)  # type: ignore[arg-type]

    assert asyncio.run(run()) == [f"{user} here" for user in USERS]
