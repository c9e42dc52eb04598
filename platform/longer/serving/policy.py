"""Who goes first, and who is known to come back. What is kept is not known here: no torch.

Each tier is a segmented LRU (Karedla, Love and Wherry, "Caching strategies to improve disk system performance", IEEE Computer,
1994): what is kept comes in on probation, and is protected once its user has come back; what is on probation goes first. That its
user came back goes with it from tier to tier: what finds no room among a tier's protected goes to the next tier, and is protected
there. So a scan of users who do not come back pushes out each other, never those who do, who have up to four fifths of every tier.

Who asks again in a moment, for a second page or after a time-out, has not come back: it is the same visit (O'Neil, O'Neil and
Weikum, "The LRU-K page replacement algorithm for database disk buffering", SIGMOD 1993: correlated references). A visit ends when
others have come in or come back whose states take a sixteenth of the tiers: less than what is on probation, so that asking
again counts before a state has to go. It ends too when its user has asked nothing for half an hour (the usual bound of a session):
else users who come back every day, but are nearly alone in the cache, would go with the first scan.

What is protected gets old by those who come back after they went: their keys are remembered as long as they and all that went
since could be protected together (Johnson and Shasha, "2Q: a low overhead high performance buffer management replacement
algorithm", VLDB 1994), and they are protected at once, in place of those who were not asked for the longest. So users who keep
coming back, and could all be protected, are all there from their third round on, whoever was protected before; and a scan never
comes back.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

_PROTECTED_SHARE = 0.8
_VISIT_SHARE = 1 / 16
_VISIT_S = 1_800.0


@dataclass(eq=False)
class Kept:
    """`num_pins` counts who uses it just now: a pinned one is no victim. `asked_again` says that its user came back for it, and
    `came_at` when it came in, as `Visits` counts; before all that is counted if nothing is said. It was last asked at `asked_s`."""

    user_key: int
    num_bytes: int
    num_pins: int = 0
    asked_again: bool = False
    came_at: float = -math.inf
    asked_s: float = -math.inf


K = TypeVar("K", bound=Kept)


class SegmentedLru(Generic[K]):
    """Order of use within one tier of `budget_bytes`. `num_bytes` is exactly the sum of what is in it; what is outdated, and goes
    before all others, is `outdated_bytes` of that."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._clear()

    def _clear(self) -> None:
        self.num_bytes = self.outdated_bytes = self._protected_bytes = 0
        self._outdated: OrderedDict[int, K] = OrderedDict()
        self._probation: OrderedDict[int, K] = OrderedDict()
        self._protected: OrderedDict[int, K] = OrderedDict()

    def __len__(self) -> int:
        return len(self._outdated) + len(self._probation) + len(self._protected)

    def __iter__(self) -> Iterator[K]:
        """In the order in which they would go."""
        yield from self._outdated.values()
        yield from self._probation.values()
        yield from self._protected.values()

    @property
    def current_bytes(self) -> int:
        """Of what is not outdated."""
        return self.num_bytes - self.outdated_bytes

    def is_outdated(self, kept: K) -> bool:
        return kept.user_key in self._outdated

    def sort(self, is_outdated: Callable[[K], bool]) -> None:
        """What is outdated, anew; what no longer is, is as hot as it was."""
        all_kept = list(self)
        self._clear()
        for kept in all_kept:
            self.add(kept, is_outdated(kept))

    def add(self, kept: K, is_outdated: bool = False) -> None:
        """It goes after all others of its segment."""
        self.num_bytes += kept.num_bytes
        if is_outdated:
            self.outdated_bytes += kept.num_bytes
            self._outdated[kept.user_key] = kept
        elif kept.asked_again:
            self._protect(kept)
        else:
            self._probation[kept.user_key] = kept

    def add_coldest(self, kept: K) -> None:
        """It goes before all others of its segment; nobody makes room among the protected for it."""
        self.num_bytes += kept.num_bytes
        is_protected = kept.asked_again and self._protected_bytes + kept.num_bytes <= self._most_protected_bytes
        segment = self._protected if is_protected else self._probation
        segment[kept.user_key] = kept
        segment.move_to_end(kept.user_key, last=False)
        self._protected_bytes += kept.num_bytes * is_protected

    def remove(self, kept: K) -> None:
        self.num_bytes -= kept.num_bytes
        if self._probation.pop(kept.user_key, None) is not None:
            return
        if self._outdated.pop(kept.user_key, None) is not None:
            self.outdated_bytes -= kept.num_bytes
            return
        del self._protected[kept.user_key]
        self._protected_bytes -= kept.num_bytes

    def touch(self, kept: K) -> None:
        """It was used: it goes after all others of its segment, which is that of the protected if it was asked for again. It is not
        outdated."""
        self.remove(kept)
        self.add(kept)

    def victim(self) -> K | None:
        """Who goes first of those who are not in use."""
        return next((kept for kept in self if not kept.num_pins), None)

    @property
    def _most_protected_bytes(self) -> float:
        return _PROTECTED_SHARE * self.budget_bytes

    def _protect(self, kept: K) -> None:
        self._protected[kept.user_key] = kept
        self._protected_bytes += kept.num_bytes
        while self._protected_bytes > self._most_protected_bytes:
            key, oldest = self._protected.popitem(last=False)
            self._protected_bytes -= oldest.num_bytes
            self._probation[key] = oldest


class Visits:
    """Tells who comes back to tiers of `tiers_bytes` from who is still there, by the bytes of all that came in or back so far, and
    by the seconds of a `clock`."""

    def __init__(self, tiers_bytes: int, clock: Callable[[], float]) -> None:
        self._longest_bytes, self._num_bytes, self._clock = _VISIT_SHARE * tiers_bytes, 0, clock

    def begin(self, kept: Kept) -> None:
        """It comes in."""
        self._num_bytes += kept.num_bytes
        kept.came_at, kept.asked_s = self._num_bytes, self._clock()

    def ask(self, kept: Kept) -> None:
        """Its user asks; `asked_again` from the first time on that this is after the visit that it came in on."""
        now_s = self._clock()
        is_over = self._num_bytes - kept.came_at > self._longest_bytes or now_s - kept.asked_s > _VISIT_S
        kept.asked_s = now_s
        if not kept.asked_again and is_over:
            kept.asked_again = True
            self._num_bytes += kept.num_bytes


class Gone:
    """Keys of the last to go, who held at most as many bytes in all as can be protected in tiers of `tiers_bytes`."""

    def __init__(self, tiers_bytes: int) -> None:
        self._most_bytes, self._num_bytes = _PROTECTED_SHARE * tiers_bytes, 0
        self._bytes_by_key: OrderedDict[int, int] = OrderedDict()

    def __contains__(self, user_key: int) -> bool:
        return user_key in self._bytes_by_key

    def add(self, user_key: int, num_bytes: int) -> None:
        self._bytes_by_key[user_key] = num_bytes
        self._num_bytes += num_bytes
        while self._num_bytes > self._most_bytes:
            self._num_bytes -= self._bytes_by_key.popitem(last=False)[1]

    def discard(self, user_key: int) -> bool:
        """Whether it was there."""
        num_bytes = self._bytes_by_key.pop(user_key, None)
        self._num_bytes -= num_bytes or 0
        return num_bytes is not None
