"""How long a client goes on with a call that may be repeated: all attempts and the pauses between them share one time."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longer.errors import UserError

_UNAVAILABLE = 503
_PART_PAUSE_S = 1.0
"""What the service asks of calls that it refuses so."""


class Patience:
    """`timeout_s` from now on, for `max_retries` more attempts."""

    def __init__(self, timeout_s: float, max_retries: int) -> None:
        self._deadline_s, self._max_retries, self._num_pauses = time.monotonic() + timeout_s, max_retries, 0

    def left_s(self) -> float:
        """Never nothing, so that what comes too late fails as a timeout."""
        return max(self._deadline_s - time.monotonic(), 1e-3)

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._deadline_s

    def pauses(self, least_s: float) -> bool:
        """Whether there is another attempt, after a pause: of `least_s` at least, twice as long each time, and half as much more at
        random, so that those who were refused together do not come back together."""
        pause_s = least_s * 2**self._num_pauses * random.uniform(1.0, 1.5)
        if self._num_pauses == self._max_retries or pause_s >= self.left_s():
            return False
        self._num_pauses += 1
        time.sleep(pause_s)
        return True


def each_answered(
    ask: Callable[[Sequence[Any], Patience], list[dict[str, Any]]],
    asked: Sequence[Mapping[str, Any]],
    patience: Patience,
    lost: type[Exception],
) -> list[dict[str, Any]]:
    """One result a request, in order. Requests whose result is 503, for which a call of their own would be repeated, are asked
    again by themselves; should that call be refused, or `lost`, what has been answered before stands."""
    results = ask(asked, patience)
    while (
        places := [place for place, result in enumerate(results) if result.get("status") == _UNAVAILABLE]
    ) and patience.pauses(_PART_PAUSE_S):
        try:
            told = ask([asked[place] for place in places], patience)
        except (UserError, lost):
            break
        for place, result in zip(places, told, strict=True):
            results[place] = result
    return results


def as_ms(seconds: float) -> str:
    """Whole milliseconds for a header, one at least."""
    return str(max(int(seconds * 1000), 1))
