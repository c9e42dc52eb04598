"""Metrics of requests that the workers of a run share, batch by batch. P packs, U users, C candidates."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from longer.arrays import Int64, RequestBatch
from longer.data.batches import Packs
from longer.training.cursor import divide
from longer.training.loader import COST_PER_BATCH, SplitData
from longer.training.steps import gather
from longer.training.streaming import StreamingMetrics
from longer.training_settings import TaskSettings


def validate(
    data: SplitData,
    packs: Packs,
    outputs: Callable[[RequestBatch], npt.NDArray[np.float32]],
    tasks: Sequence[TaskSettings],
    rank: int,
    num_workers: int,
) -> dict[str, dict[str, float]]:
    """Metrics of the requests of some packs by task; the same on every worker, each of which scores whole users.

    All call `outputs` equally often, so that it may be the work of all together: who has fewer batches borrows a pack.
    """
    totals = StreamingMetrics(tasks)
    batches = list(_batches(data, packs, rank, num_workers))
    for _ in range(max(gather(len(batches), num_workers)) - len(batches)):
        outputs(data.batch(packs.take(np.zeros(1, np.int64))))
    for chosen in batches:
        batch = data.batch(chosen)
        user_C = np.repeat(data.row_R[chosen.order_R], np.diff(batch.candidates.offsets_R1))
        totals.add(outputs(batch), batch.labels, user_C)
    totals.close()
    first, *others = gather(totals, num_workers)
    for other in others:
        first.merge(other)
    return first.metrics()


def _batches(data: SplitData, packs: Packs, rank: int, num_workers: int) -> Iterator[Packs]:
    """One worker's users, of similar cost together; a user's packs follow one another, in a batch or over several."""
    cost_P, user_P = data.cost(packs), data.row_R[packs.order_R[packs.offsets_P1[:-1]]]
    users_U, user_P = np.unique(user_P, return_inverse=True)
    cost_U = np.bincount(user_P, cost_P, len(users_U)).astype(np.int64)
    worker_U = divide(cost_U, np.zeros(len(users_U), np.int64), num_workers)
    mean_cost_U = cost_U // np.maximum(1, np.bincount(user_P, minlength=len(users_U)))
    mine: Int64 = np.flatnonzero(worker_U[user_P] == rank)
    mine = mine[np.lexsort((mine, user_P[mine], mean_cost_U[user_P[mine]]))]
    batch_P = np.cumsum(cost_P[mine]) // COST_PER_BATCH
    for members in np.split(mine, np.flatnonzero(np.diff(batch_P)) + 1):
        if len(members):
            yield packs.take(members)
