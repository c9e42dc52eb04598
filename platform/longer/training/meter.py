"""How fast a run goes and where its time goes: what its progress tells, and scalars for TensorBoard."""

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensorboardX import SummaryWriter

from longer.files import file_sizes, read_bytes, remove_tree, write_bytes

_SECONDS_BETWEEN_NOTES = 0.5
"""No more often does the driver look."""


class Meter:
    """Speed since the start of this process, without pauses, and the time left, with them; a note is due every half a second.

    `num_pauses` are to come: validations with their checkpoints, and tests of days.
    """

    def __init__(self, num_steps: int, num_pauses: int, device: torch.device) -> None:
        self.num_steps, self.loss, self._device = num_steps, math.nan, device
        self._num_pauses, self._num_paused, self._paused_s = num_pauses, 0, 0.0
        self._started = self._told = time.perf_counter()
        self._num_steps_here, self._num_requests, self._num_candidates = 0, 0, 0
        self._phase_s: dict[str, float] = {}
        self._phases_until_s = math.inf

    def add(self, num_requests: int, num_candidates: int) -> None:
        self._num_steps_here += 1
        self._num_requests += num_requests
        self._num_candidates += num_candidates

    def add_phases(self, seconds: dict[str, float]) -> None:
        """What `PhaseTimer.take` gave, of the time until now."""
        self._phases_until_s = time.perf_counter() - self._started
        for name, value in seconds.items():
            self._phase_s[name] = self._phase_s.get(name, 0.0) + value

    def rates(self) -> dict[str, float]:
        """Over all workers since this process started, and this one's share of time in each phase until they were last told.

        `paused_share` is of all the time; what else is told is of the time without pauses.
        """
        elapsed_s = time.perf_counter() - self._started
        shares = {f"{name}_share": value / self._phases_until_s for name, value in self._phase_s.items()}
        return {
            "elapsed_s": elapsed_s,
            "step_ms": 1e3 * elapsed_s / self._num_steps_here,
            "requests_per_s": self._num_requests / elapsed_s,
            "impressions_per_s": self._num_candidates / elapsed_s,
            **shares,
            "paused_share": self._paused_s / (elapsed_s + self._paused_s),
            **self._gpu_memory(),
        }

    def is_due(self, done: int) -> bool:
        """True now and then, and at the end."""
        now = time.perf_counter()
        due = now - self._told >= _SECONDS_BETWEEN_NOTES or done == self.num_steps
        self._told = now if due else self._told
        return due

    def left_s(self, done: int) -> float:
        """Until the end, if steps and pauses take as long as they did so far; before the first pause, without any."""
        step_s = (time.perf_counter() - self._started) / self._num_steps_here
        pause_s = self._paused_s / max(1, self._num_paused)
        return (self.num_steps - done) * step_s + (self._num_pauses - self._num_paused) * pause_s

    def note(self, done: int) -> str:
        """What progress says beside the number of steps `done`."""
        rates = self.rates()
        parts = [  # a narrow terminal shows the first ones
            f"about {self.left_s(done):.0f} s left",
            f"{rates['requests_per_s']:.0f} requests/s",
            f"{rates['impressions_per_s']:.0f} impressions/s",
            *([f"GPU memory {rates['gpu_bytes'] / 2**30:.1f} GiB"] if "gpu_bytes" in rates else []),
            f"loss {self.loss:.4f}",
            f"waiting for data {rates.get('data_wait_share', 0.0):.0%}",
        ]
        if "others_wait_share" in rates:
            parts.append(f"for other workers' data {rates['others_wait_share']:.0%}")
        return ", ".join(parts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside counts for the time left only."""
        began = time.perf_counter()
        yield
        paused_s = time.perf_counter() - began
        self._started += paused_s
        self._paused_s += paused_s
        self._num_paused += 1

    def _gpu_memory(self) -> dict[str, float]:
        """The most that tensors have held on this worker's GPU."""
        return {"gpu_bytes": torch.cuda.max_memory_allocated(self._device)} if self._device.type == "cuda" else {}


class Scalars:
    """A run's history as TensorBoard reads it, in `folder`: written there as it comes, or on S3 copied there now and then.

    What a killed process left is replaced: the folder shows `history` and what is added.
    """

    def __init__(self, folder: str, history: list[dict[str, Any]]) -> None:
        remove_tree(folder)
        self._folder, self._on_s3 = folder, folder.startswith("s3://")
        self._local = tempfile.mkdtemp(prefix="tensorboard-") if self._on_s3 else folder
        self._writer = SummaryWriter(self._local)
        for record in history:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        """One record of the history: numbers, or dictionaries of numbers, at its step."""
        for name, value in _flat(record, ""):
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def save(self) -> None:
        """Writes most of what was added; the writer keeps a few events back until it is closed."""
        self._writer.flush()
        self._upload()

    def close(self) -> None:
        """Writes all that was added; nothing is left of it on this machine if it is on S3."""
        self._writer.close()
        self._upload()
        if self._on_s3:
            remove_tree(self._local)

    def _upload(self) -> None:
        if self._on_s3:
            for name in file_sizes(self._local):
                write_bytes(f"{self._folder}/{name}", read_bytes(f"{self._local}/{name}"))


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value
