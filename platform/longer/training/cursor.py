"""The order of training: a pure function of (table version, seed, epoch), whatever the number of workers.

Packs (requests that share a history) of an epoch are shuffled and cut into steps of about equal cost, none above a budget; each
step is divided into batches of about equal cost, some for each worker. A position is (epoch, step): a run resumed there, with
any number of workers, repeats no request and skips none.

P packs of an epoch, S its steps, N batches of a step.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longer.arrays import Int64, offsets_of
from longer.errors import UserError

MIN_PACKS_OF_STEP = 3
"""Costliest packs that a step must hold: with fewer, equal steps could be empty or above the budget."""


@dataclass(frozen=True, order=True)
class Position:
    """The next step to train; steps are counted within the epoch."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class EpochPlan:
    """Batch n of step s is the packs `packs_P[offsets_SN1[s * N + n] : offsets_SN1[s * N + n + 1]]`; it may have none."""

    packs_P: Int64
    offsets_SN1: Int64
    num_batches: int

    @property
    def num_steps(self) -> int:
        return (len(self.offsets_SN1) - 1) // self.num_batches

    def batch(self, step: int, number: int) -> Int64:
        """The packs of one batch."""
        first = step * self.num_batches + number
        return self.packs_P[self.offsets_SN1[first] : self.offsets_SN1[first + 1]]

    def step(self, step: int) -> Int64:
        """The packs of all batches of a step; at least one."""
        first = step * self.num_batches
        return self.packs_P[self.offsets_SN1[first] : self.offsets_SN1[first + self.num_batches]]

    def sums(self, values: npt.NDArray[np.integer]) -> Int64:
        """[S, N] sum of `values`, one a pack of the cursor, in each batch: sizes of every batch before one is made."""
        ends = offsets_of(values[self.packs_P])
        return np.diff(ends[self.offsets_SN1]).reshape(-1, self.num_batches)


class DataCursor:
    """Which packs are trained in each step, and in which of its batches.

    `cost` (events and candidates to compute) describes all packs; `epochs` holds the packs of each epoch in turn; `key` names
    the table version and seed. No step costs more than `tokens_per_step`, and none is empty; UserError if the budget is too
    small for that.
    """

    def __init__(self, key: str, cost: Int64, epochs: Sequence[Int64], tokens_per_step: int) -> None:
        costliest = int(cost.max(initial=0))
        if tokens_per_step < MIN_PACKS_OF_STEP * costliest:
            raise UserError(
                f"train.tokens_per_step={tokens_per_step}: the costliest requests that share a history compute {costliest} events "
                f"and candidates, and a step must hold {MIN_PACKS_OF_STEP} such: raise it to {MIN_PACKS_OF_STEP * costliest}"
            )
        self._key, self._cost, self._epochs = key, cost, epochs
        self._steps_E = np.array([_num_steps(cost[packs], tokens_per_step) for packs in epochs], np.int64)
        self._first_step_E = np.cumsum(self._steps_E) - self._steps_E
        self._plan: tuple[tuple[int, int], EpochPlan] | None = None

    @property
    def num_epochs(self) -> int:
        return len(self._epochs)

    @property
    def num_steps(self) -> int:
        """Of all epochs."""
        return int(self._steps_E.sum())

    def steps_of(self, epoch: int) -> int:
        return int(self._steps_E[epoch])

    def global_step(self, position: Position) -> int:
        """Steps before this position."""
        return (
            int(self._first_step_E[position.epoch]) + position.step
            if position.epoch < self.num_epochs
            else self.num_steps
        )

    def after(self, position: Position) -> Position:
        """The position one step on."""
        last = position.step + 1 == self._steps_E[position.epoch]
        return Position(position.epoch + 1, 0) if last else Position(position.epoch, position.step + 1)

    def num_saves(self, position: Position, every: int) -> int:
        """Steps from this position on that are the last ones of an epoch, or of `every` ones."""
        ends, before = map(int, self._first_step_E + self._steps_E), self.global_step(position)
        return sum(step > before for step in {*ends, *range(every, self.num_steps + 1, every)})

    def plan(self, epoch: int, num_batches: int) -> EpochPlan:
        """All steps of an epoch, each divided into `num_batches`: the same on every worker. The last one asked for is kept."""
        if self._plan is None or self._plan[0] != (epoch, num_batches):
            packs = self._epochs[epoch]
            packs = packs[_permutation(f"{self._key}/{epoch}", len(packs))]
            cost_P = self._cost[packs]
            before_P = np.cumsum(cost_P) - cost_P
            step_P = before_P * self._steps_E[epoch] // max(1, cost_P.sum())
            batch_P = divide(cost_P, step_P, num_batches)
            order = np.lexsort((np.arange(len(packs)), batch_P, step_P))
            number_P = (step_P * num_batches + batch_P)[order]
            offsets = np.searchsorted(number_P, np.arange(self._steps_E[epoch] * num_batches + 1))
            self._plan = (epoch, num_batches), EpochPlan(packs[order], offsets, num_batches)
        return self._plan[1]


def divide(cost_P: Int64, step_P: Int64, num_batches: int) -> Int64:
    """A batch for each pack: in every step (ascending) costliest first, each to the batch that costs least so far.

    No batch costs more than a fair share of its step and one pack. All steps advance together, a pack at a time.
    """
    order = np.lexsort((-cost_P, step_P))
    steps, starts_S, sizes_S = np.unique(step_P[order], return_index=True, return_counts=True)
    load_SN = np.zeros((len(steps), num_batches), np.int64)
    batch_P = np.empty(len(cost_P), np.int64)
    longest_first = np.argsort(-sizes_S, kind="stable")
    still_S = np.searchsorted(-sizes_S[longest_first], -np.arange(1, sizes_S.max(initial=0) + 1), side="right")
    for place, still in enumerate(still_S):
        steps_here = longest_first[:still]
        packs = order[starts_S[steps_here] + place]
        batches = load_SN[steps_here].argmin(axis=1)
        batch_P[packs] = batches
        load_SN[steps_here, batches] += cost_P[packs]
    return batch_P


def batches_per_worker(tokens_per_step: int, costliest: int, num_workers: int, max_tokens_per_batch: int | None) -> int:
    """Batches into which each worker's part of a step is cut, so that by `divide`'s bound none exceeds `max_tokens_per_batch`."""
    if max_tokens_per_batch is None:
        return 1
    if max_tokens_per_batch < 2 * costliest:
        raise UserError(
            f"train.max_tokens_per_batch={max_tokens_per_batch}: the costliest requests that share a history compute {costliest} "
            f"events and candidates, and a batch must hold 2 such: raise it to {2 * costliest}"
        )
    return -(-tokens_per_step // (num_workers * (max_tokens_per_batch - costliest)))


def _num_steps(cost_P: Int64, tokens_per_step: int) -> int:
    """As few steps of equal shares as keep each within the budget, whose last pack may lie across the end of its share."""
    total, costliest = int(cost_P.sum()), int(cost_P.max(initial=0))
    return 1 if total <= tokens_per_step else -(-total // (tokens_per_step - costliest))


def _permutation(key: str, size: int) -> Int64:
    """Philox's raw stream is fixed for ever, unlike `Generator.permutation`, whose algorithm NumPy may change."""
    philox_key = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=philox_key).random_raw(size), kind="stable")
