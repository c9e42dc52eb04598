"""Marks of users of whom nothing that has outlived its replica may come back. No torch, no Ray.

FOLDER/forgotten/USER_KEY-MILLISECONDS    the user was forgotten then; all is in the name, so that a listing tells it
"""

import re
import time
from collections.abc import Iterable
from contextlib import suppress

from longer.files import file_sizes, remove_tree, write_bytes

FORGOTTEN = "forgotten"
_MARK = re.compile(r"(-?\d+)-(\d+)")
_CLOCK_SKEW_S = 3600.0


class ForgottenUsers:
    """The marks of the dumps under one folder."""

    def __init__(self, folder: str) -> None:
        self._folder = f"{folder}/{FORGOTTEN}"

    def mark(self, user_key: int) -> None:
        """No dump that has begun by now brings the user back."""
        write_bytes(f"{self._folder}/{user_key}-{round(time.time() * 1000)}", b"forgotten")

    def times_s(self) -> dict[int, float]:
        """When each user who is marked was last forgotten, by key."""
        return marked_s(file_sizes(self._folder))

    def remove_before(self, began_s: float) -> None:
        """Marks that are of no dump which has begun by then or later."""
        for name in file_sizes(self._folder):
            for forgotten_s in marked_s([name]).values():
                if not may_hold(began_s, forgotten_s):
                    with suppress(FileNotFoundError):  # others remove it at the same time
                        remove_tree(f"{self._folder}/{name}")


def marked_s(names: Iterable[str]) -> dict[int, float]:
    """By user key, the last time that the names of marks tell; what else lies there is unfinished."""
    found = dict[int, float]()
    for mark in filter(None, map(_MARK.fullmatch, names)):
        user_key, forgotten_s = int(mark[1]), int(mark[2]) / 1000
        found[user_key] = max(forgotten_s, found.get(user_key, forgotten_s))
    return found


def may_hold(began_s: float, forgotten_s: float) -> bool:
    """Whether a dump that began then may hold what was forgotten then, whoever's clock is wrong."""
    return forgotten_s > began_s - _CLOCK_SKEW_S
