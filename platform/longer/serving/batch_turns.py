"""One process of a machine first, then all others: what the first compiles, they find in the compilers' caches on the disk."""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_DONE = b"done"


@contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Whoever comes first is alone inside; once it is through, all others go in side by side.

    If it fails or dies, the next one is the first: the kernel gives the lock back with the process.
    """
    with open(f"{tempfile.gettempdir()}/{name}.lock", "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if is_later := file.read() == _DONE:
            fcntl.flock(file, fcntl.LOCK_UN)
        yield
        if not is_later:
            file.write(_DONE)  # on the disk before the lock is given back, by closing
