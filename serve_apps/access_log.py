"""One JSON line a call: when, what kind, how it ended, how long each stage took. Never who asked about what, and no token.

    {"time_ms": 1764240000000, "route": "score", "status": 200, "latency_ms": 3.2, "stages_ms": {"parse": 0.1, "queue": 0.0,
     "score": 2.9, "answer": 0.1}, "num_users": 1, "num_candidates": 500, "source": "hit", "model_version": "375d521b5db5a03f",
     "replica": "x1y2z3"}

Lines that the disk is too slow for are left out, and counted: {"time_ms": 1764240000000, "left_out": 12}.

Stages: `parse` (the body is read and understood), `queue`, `history`, `encode`, `append` and `score` as in
`serve_apps/metrics.py`, those of the batch that the call was in, and `answer`. Where a call asks for several users, `source` is
null, the stages are the last one's who was scored here, and `owners` is how much longer the other replicas took for theirs.
"""

import logging
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from serve_apps.batcher import Times

_MOST_BYTES, _KEPT_FILES = 100 << 20, 5
_MOST_WAITING = 20_000
"""Lines, of about a kilobyte in memory each, that may wait for the disk."""


@dataclass
class Call:
    """What is said of one call; whoever answers it fills this in."""

    route: str
    timeout_s: float = 0.0
    started_s: float = field(default_factory=time.perf_counter)
    stages_ms: dict[str, float] = field(default_factory=dict)
    num_users: int = 0
    num_candidates: int = 0
    source: str | None = None
    model_version: str | None = None

    def __post_init__(self) -> None:
        self._since_s = self.started_s

    def ends(self, stage: str) -> None:
        """What was done since the last stage was this one."""
        now_s = time.perf_counter()
        self.stages_ms[stage] = (now_s - self._since_s) * 1000
        self._since_s = now_s

    def was_in(self, batch: Times) -> None:
        """What was done since the last stage was this batch."""
        read = {"history": batch.aside_ms} if batch.aside_ms else {}
        self.stages_ms |= {"queue": batch.queue_ms, **read, **batch.batch_ms}
        self._since_s = time.perf_counter()

    @property
    def left_s(self) -> float:
        """Of the time that the call may take; below 0 past it."""
        return self.started_s + self.timeout_s - time.perf_counter()

    @property
    def latency_ms(self) -> float:
        return (time.perf_counter() - self.started_s) * 1000


class AccessLog:
    """Lines of calls, kept until `flush` has them written all at once: a call waits for no disk."""

    def __init__(self, folder: str, replica: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._replica, self._lines, self._num_left_out = replica, deque[dict[str, Any]](maxlen=_MOST_WAITING), 0
        self._writer = ThreadPoolExecutor(1, "access-log")
        self._writing: Future[None] | None = None
        self._file = RotatingFileHandler(f"{folder}/access_{replica}.jsonl", "a", _MOST_BYTES, _KEPT_FILES, delay=True)

    def note(self, call: Call, status: int, latency_ms: float) -> None:
        self._num_left_out += len(self._lines) == _MOST_WAITING
        self._lines.append(
            {
                "time_ms": int(time.time() * 1000),
                "route": call.route,
                "status": status,
                "latency_ms": round(latency_ms, 3),
                "stages_ms": _rounded(call.stages_ms),
                "num_users": call.num_users,
                "num_candidates": call.num_candidates,
                "source": call.source,
                "model_version": call.model_version,
                "replica": self._replica,
            }
        )

    def flush(self) -> None:
        """Has a thread of its own write what was noted, unless it is still at what was noted before."""
        if self._lines and (self._writing is None or self._writing.done()):
            self._writing = self._writer.submit(self._write)

    def close(self) -> None:
        """Waits until all is written."""
        self._writer.submit(self._write)
        self._writer.shutdown()
        self._file.close()

    def _write(self) -> None:
        lines = [to_json(self._lines.popleft()) for _ in range(len(self._lines))]
        num_left_out, self._num_left_out = self._num_left_out, 0
        if num_left_out:
            lines.append(to_json({"time_ms": int(time.time() * 1000), "left_out": num_left_out}))
        if lines:
            self._file.emit(logging.makeLogRecord({"msg": b"\n".join(lines).decode()}))


def _rounded(stages_ms: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(ms, 3) for stage, ms in stages_ms.items()}
