"""One process of a machine first, then all others: what the first compiles, they find in the compilers' caches on the disk."""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from longer.progress import say

_ASKED_EVERY_S = 0.2
_TOLD_EVERY_S = 30.0
_MOST_WAIT_S = 600.0


@contextmanager
def first_alone(name: str, run: str) -> Iterator[None]:
    """Whoever of a run comes first is alone inside; once it is through, all others of the run go in side by side, and after ten
    minutes in any case.

    If it fails or dies, the next one is the first: the kernel gives the lock back with the process. The file that tells which run
    is through stays, one for all runs.
    """
    with open(f"{tempfile.gettempdir()}/longer-{os.getuid()}-{name}.lock", "a+b") as file:
        is_locked = _lock(file, name)
        file.seek(0)
        if is_later := file.read() == run.encode() or not is_locked:
            fcntl.flock(file, fcntl.LOCK_UN)
        yield
        if not is_later:
            file.truncate(0)
            file.write(run.encode())  # on the disk before the lock is given back, by closing


def _lock(file: IO[bytes], name: str) -> bool:
    """Whether the lock came in time; tells now and then that it is waited for."""
    begun = told = time.monotonic()
    while time.monotonic() - begun < _MOST_WAIT_S:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(_ASKED_EVERY_S)
        if time.monotonic() - told >= _TOLD_EVERY_S:
            told = time.monotonic()
            say(name, f"another process of this machine has been at it for {told - begun:.0f} s; this one waits")
    say(name, f"another process of this machine has been at it for {_MOST_WAIT_S:.0f} s; this one goes on by itself")
    return False
