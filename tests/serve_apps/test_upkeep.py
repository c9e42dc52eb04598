"""What a replica looks for beside its calls does not wait for each other, without Serve."""

import asyncio

from longer.ring import Ring
from serve_apps.affinity import Affinity
from serve_apps.upkeep import Upkeep


class SlowKeeper:
    """Has so many dumps to read that it is still at them when the ring changes, and changes again."""

    def __init__(self) -> None:
        self.began, self.may_end = list[frozenset[str]](), asyncio.Event()

    async def bring(self, ring: Ring) -> None:
        self.began.append(ring.replica_ids)
        await self.may_end.wait()


def test_a_replica_that_comes_or_dies_while_states_are_brought_is_seen_at_the_next_look() -> None:
    """Else, for minutes, calls that reach their owner are counted as lost, and parts and events go to one that is gone."""
    affinity, keeper, names = Affinity("me"), SlowKeeper(), list[str]()

    async def ask_urls() -> list[tuple[str, str | None] | BaseException]:
        return [(name, None) for name in names]

    upkeep = Upkeep(None, affinity, keeper, None, ask_urls, refresh_s=600)  # type: ignore[arg-type]

    async def look(*now: str) -> frozenset[str]:
        names[:] = now
        upkeep.begin()
        await asyncio.sleep(0.01)
        assert affinity.ring
        return affinity.ring.replica_ids

    async def run() -> None:
        assert await look("me", "dies") == {"me", "dies"}
        assert await look("me", "comes") == {"me", "comes"}
        assert await look("me") == {"me"}
        assert keeper.began == [{"me", "dies"}]
        keeper.may_end.set()
        await look("me")
        assert keeper.began == [{"me", "dies"}, {"me"}]

    asyncio.run(run())


def test_one_that_is_silent_keeps_its_place_and_no_other_out_of_the_ring() -> None:
    """Else nobody would know of one that has come for as long as another is silent, which Serve lets it be for half a minute."""
    told: list[tuple[str, str | None] | BaseException] = []
    affinity, keeper = Affinity("me"), SlowKeeper()

    async def ask_urls() -> list[tuple[str, str | None] | BaseException]:
        return told

    upkeep = Upkeep(None, affinity, keeper, None, ask_urls, refresh_s=600)  # type: ignore[arg-type]

    async def look(*now: tuple[str, str | None] | BaseException) -> frozenset[str]:
        told[:] = now
        upkeep.begin()
        await asyncio.sleep(0.01)
        assert affinity.ring
        return affinity.ring.replica_ids

    async def run() -> None:
        assert await look(("me", None), ("silent", "its")) == {"me", "silent"}
        assert await look(("me", None), TimeoutError(), ("comes", None)) == {"me", "silent", "comes"}
        assert affinity.urls["silent"] == "its"
        assert await look(("me", None), RuntimeError("it died"), ("comes", None)) == {"me", "comes"}
        assert await look(TimeoutError()) == {"me", "comes"}

    asyncio.run(run())
