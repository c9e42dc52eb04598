"""Which runs at a version on S3 are alive, so that what dead ones have left can be removed. A disk has one run at a time: a lock.

No clock is asked: a run that is alive renews its mark, one that is dead does not.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from longer.errors import StorageError
from longer.files import read_bytes, write_bytes

_RENEWED_AFTER_S = 2.0
_SILENT_S = 10.0
"""Without a new mark, a run is taken for dead. Its files are then removed from a version that is published: if it is not, it will
use what is published."""


@contextmanager
def marked_alive(mark: str) -> Iterator[None]:
    """Renews the file `mark` all the while."""

    def renew() -> None:
        write_bytes(mark, uuid.uuid4().hex.encode())

    with suppress(StorageError):  # the run itself will meet it
        renew()
    with meanwhile(renew, _RENEWED_AFTER_S):
        yield


@contextmanager
def meanwhile(work: Callable[[], None], every_s: float) -> Iterator[None]:
    """Calls `work` every so many seconds, in a thread; what storage has against it, the run itself will meet."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(every_s):
            with suppress(StorageError):
                work()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def silent(marks: set[str]) -> set[str]:
    """Those of the marks that nobody renews; waits until that is seen."""
    until = time.monotonic() + _SILENT_S
    seen = {mark: _read(mark) for mark in marks}
    while seen and time.monotonic() < until:
        time.sleep(_RENEWED_AFTER_S / 2)
        seen = {mark: content for mark, content in seen.items() if _read(mark) == content}
    return set(seen)


def _read(mark: str) -> bytes:
    try:
        return read_bytes(mark)
    except FileNotFoundError:
        return b""
