"""Progress of a stage: a bar on a terminal, plain lines now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 5.0


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
