"""Progress of a stage: a bar on a terminal, plain lines now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from tqdm import tqdm

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_RELAYS = 0.5


def track(items: Iterable[T], total: int, stage: str, unit: str) -> Iterator[T]:
    """Yields the items while telling which stage this is, how far it is and how fast it goes."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=stage, unit=f" {unit}", dynamic_ncols=True)
        return
    started = last = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if done == total or now - last >= _SECONDS_BETWEEN_LINES:
            print(f"{stage}: {done}/{total} {unit}, {done / (now - started):.1f} {unit}/s", file=sys.stderr, flush=True)
            last = now


def say(stage: str, message: str) -> None:
    """One line on how a stage went."""
    print(f"{stage}: {message}", file=sys.stderr, flush=True)


@ray.remote(num_cpus=0)
class Lines:
    """Lines on their way from workers to the driver. Ray's own forwarding would bring every worker's chatter along."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, str]] = []

    def add(self, stage: str, message: str) -> None:
        self._lines.append((stage, message))

    def take(self) -> list[tuple[str, str]]:
        taken, self._lines = self._lines, []
        return taken


@contextmanager
def relayed_lines() -> Iterator[Any]:
    """A handle of `Lines` for workers to `add.remote(stage, message)` to; what they add is said here, until the block ends."""
    lines, ended = Lines.remote(), threading.Event()  # type: ignore[attr-defined]

    def relay() -> None:
        while True:
            last = ended.wait(_SECONDS_BETWEEN_RELAYS)
            for stage, message in ray.get(lines.take.remote()):
                say(stage, message)
            if last:
                return

    thread = threading.Thread(target=relay, name="relay", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        thread.join()
