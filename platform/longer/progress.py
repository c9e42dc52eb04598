"""Progress of a stage: a bar on a terminal, plain lines now and then elsewhere."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 5.0
_PART_BEFORE_AN_END_IS_TOLD = 0.25
"""The first items need not be like the others, and some are half done."""

_BAR_WITHOUT_END = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
_BAR_WITH_NOTE = "{desc}: {percentage:3.0f}%|{bar:10}| {unit} {n_fmt}/{total_fmt}{postfix}"


def track(
    items: Iterable[T],
    total: int,
    stage: str,
    unit: str,
    note: Callable[[], str] | None = None,
    seconds: Callable[[], float] | None = None,
    part_done: Callable[[], float] | None = None,
) -> Iterator[T]:
    """Yields the items while telling which stage this is, how far it is, how fast it goes, and what `note` adds to that.

    How long it will take is told once a quarter is done.

    `seconds` says how long the work has been going on, where that began later than this call, and `part_done` which part of it is
    done, where items are not of one size; both are asked once an item is there.
    """
    if sys.stderr.isatty():
        bar = tqdm(items, total=total, desc=stage, unit=f" {unit}", dynamic_ncols=True)
        for item in bar:
            yield item
            part = part_done() if part_done else (bar.n + 1) / total
            bar.bar_format = None if _is_end_told(part) else _BAR_WITHOUT_END
            if seconds:
                bar.start_t = time.time() - seconds()
            parts = [note()] if note else []
            if part_done:  # the bar itself would count items
                bar.bar_format = _BAR_WITHOUT_END
                parts += _left(time.time() - bar.start_t, part)
            bar.set_postfix_str(", ".join(parts))
        return
    started = last = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if done == total or now - last >= _SECONDS_BETWEEN_LINES:
            spent = seconds() if seconds else now - started
            parts = [f"{stage}: {done}/{total} {unit}", f"{done / spent:.1f} {unit}/s", *([note()] if note else [])]
            parts += _left(spent, part_done() if part_done else done / total) if done < total else []
            print(", ".join(parts), file=sys.stderr, flush=True)
            last = now


class Bar:
    """How far work is that goes on elsewhere: one line written anew on a terminal, plain lines now and then elsewhere."""

    def __init__(self, unit: str) -> None:
        self._unit, self._told = unit, -math.inf
        self._bar: tqdm | None = None

    def show(self, stage: str, done: int, total: int, note: str) -> None:
        """`done` of `total`, and what its worker says of speed and end."""
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(
                    total=total, desc=stage, unit=self._unit, bar_format=_BAR_WITH_NOTE, dynamic_ncols=True
                )
            self._bar.n = done
            self._bar.set_postfix_str(note)
        elif done == total or time.perf_counter() - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = time.perf_counter()
            say(stage, f"{self._unit} {done}/{total}, {note}")

    def close(self) -> None:
        """The last line stays."""
        if self._bar is not None:
            self._bar.close()


def _is_end_told(part: float) -> bool:
    return part >= _PART_BEFORE_AN_END_IS_TOLD


def _left(spent_s: float, part: float) -> list[str]:
    return [f"about {spent_s * (1 - part) / part:.0f} s left"] if _is_end_told(part) else []


def say(stage: str, message: str) -> None:
    """One line on how a stage went, above a bar if there is one."""
    tqdm.write(f"{stage}: {message}", file=sys.stderr)
    sys.stderr.flush()
