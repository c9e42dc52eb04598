"""The order of training: a pure function of (table version, seed, epoch), whatever the number of workers.

Packs (requests that share a history) are shuffled, cut into global steps of about equally many requests, and each step is
divided over the workers by cost. A position is (epoch, step): a run resumed there, with any number of workers, repeats no
request and skips none.

P packs.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from longer.arrays import Int64


@dataclass(frozen=True, order=True)
class Position:
    """The next step to train; steps are counted within the epoch."""

    epoch: int = 0
    step: int = 0


class DataCursor:
    """Which packs each worker trains in each step.

    `num_requests_P` and `cost_P` (events and candidates to compute) describe the packs; `key` names the table version and seed.
    """

    def __init__(self, key: str, num_requests_P: Int64, cost_P: Int64, requests_per_step: int) -> None:
        self._key, self._num_requests_P, self._cost_P = key, num_requests_P, cost_P
        self._num_requests = int(num_requests_P.sum())
        # Rounded down, and with no pack larger than a step, every step holds at least one pack.
        self.steps_per_epoch = max(1, self._num_requests // max(requests_per_step, int(num_requests_P.max())))
        self._epoch: tuple[int, Int64, Int64] | None = None

    def global_step(self, position: Position) -> int:
        return position.epoch * self.steps_per_epoch + position.step

    def after(self, position: Position) -> Position:
        """The position one step on."""
        last = position.step + 1 == self.steps_per_epoch
        return Position(position.epoch + 1, 0) if last else Position(position.epoch, position.step + 1)

    def packs_of_step(self, position: Position) -> Int64:
        """Packs of a whole step, over all workers; at least one."""
        order_P, step_bounds = self._shuffled(position.epoch)
        return order_P[step_bounds[position.step] : step_bounds[position.step + 1]]

    def packs_of_worker(self, position: Position, rank: int, num_workers: int) -> Int64:
        """One worker's part of a step; every worker computes the same division."""
        packs = self.packs_of_step(position)
        return packs[divide(self._cost_P[packs], num_workers)[rank]]

    def _shuffled(self, epoch: int) -> tuple[Int64, Int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            order_P = _permutation(f"{self._key}/{epoch}", len(self._num_requests_P))
            requests = self._num_requests_P[order_P]
            step_P = (np.cumsum(requests) - requests) * self.steps_per_epoch // self._num_requests
            self._epoch = (epoch, order_P, np.searchsorted(step_P, np.arange(self.steps_per_epoch + 1)))
        return self._epoch[1], self._epoch[2]


def divide(cost_P: Int64, num_workers: int) -> list[Int64]:
    """Indices for each worker, ascending: costliest first, each to the worker with the least to do so far."""
    load = np.zeros(num_workers, np.int64)
    worker_P = np.empty(len(cost_P), np.int64)
    for pack in np.argsort(-cost_P, kind="stable"):
        worker_P[pack] = load.argmin()
        load[worker_P[pack]] += cost_P[pack]
    return [np.flatnonzero(worker_P == worker) for worker in range(num_workers)]


def _permutation(key: str, size: int) -> Int64:
    """Philox's raw stream is fixed for ever, unlike `Generator.permutation`, whose algorithm NumPy may change."""
    philox_key = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=philox_key).random_raw(size), kind="stable")
