"""Marks of users of whom nothing that has outlived its replica may come back. No torch, no Ray.

FOLDER/forgotten/USER_KEY.json            when the user was forgotten
"""

import json
import time
from contextlib import suppress

from longer.storage import file_sizes, read_bytes, remove_tree, write_bytes

FORGOTTEN = "forgotten"
_CLOCK_SKEW_S = 3600.0


class ForgottenUsers:
    """The marks of the dumps under one folder."""

    def __init__(self, folder: str) -> None:
        self._folder = f"{folder}/{FORGOTTEN}"

    def mark(self, user_key: int) -> None:
        """No dump that has begun by now brings the user back."""
        write_bytes(self._path(user_key), json.dumps({"forgotten_s": time.time()}).encode())

    def times_s(self) -> dict[int, float]:
        """When each user who is marked was forgotten, by key."""
        found = dict[int, float]()
        for name in file_sizes(self._folder):
            if name.endswith(".json"):  # the others are unfinished
                user_key = int(name.removesuffix(".json"))
                with suppress(FileNotFoundError):  # removed meanwhile: with it went the dumps that it was of
                    found[user_key] = json.loads(read_bytes(self._path(user_key)))["forgotten_s"]
        return found

    def remove_before(self, began_s: float) -> None:
        """Marks that are of no dump which has begun by then or later."""
        for user_key, forgotten_s in self.times_s().items():
            if not may_hold(began_s, forgotten_s):
                with suppress(FileNotFoundError):  # others stop at the same time
                    remove_tree(self._path(user_key))

    def _path(self, user_key: int) -> str:
        return f"{self._folder}/{user_key}.json"


def may_hold(began_s: float, forgotten_s: float) -> bool:
    """Whether a dump that began then may hold what was forgotten then, whoever's clock is wrong."""
    return forgotten_s > began_s - _CLOCK_SKEW_S
