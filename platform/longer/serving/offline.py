"""Many requests of many users on one device, in bounded memory: users side by side, each one's requests in time order.

There are two ways, with equal scores. A sweep encodes a user's history once and appends to it from request to request: the fewest
tokens. Packs (`packed.py`) encode a window anew wherever it moves, all users in one pass: the fewest launches.

B users, R requests, C candidates in all of them, I items that every request is asked about, P packs, U users, T tasks, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from longer.arrays import Candidates, Float32, Int64
from longer.data.batches import plan_packs
from longer.model.fuse import has_kernels
from longer.model.inputs import feature_tensors
from longer.model.longer import Longer
from longer.model.sweep import Asked, Sweep
from longer.serving.packed import ALONE, Packed, score_packed
from longer.serving.questions import Budget, Questions, candidates_of
from longer.serving.stages import stage

_PACK_REQUESTS = 256
"""Most requests of one user that are asked together: a wave then has work for a GPU, and fewer waves are launched."""

_PACKED_GAIN = 3.0
"""On a GPU packs pay where they compute up to so many events and candidates for each that a sweep does. An H100 scored 4.7 M
candidates a second in packs that computed twice as many as the sweep, which scored 2.7 M."""

_STATELESS_PACK_REQUESTS = 64
"""The same for encoders that keep no user state, each of whose requests reads its history anew."""


def waves(questions: Questions, budget: Budget) -> Iterator[tuple[Int64, Asked]]:
    """Every request once: rows of `questions`, and those requests ready to be scored, users of similar length together.

    A user's history is encoded once and appended to from one wave to the next; requests whose windows agree share a wave.
    """
    if not len(questions):
        return
    assert isinstance(budget.model, Longer)
    model, row_R, end_R = budget.model, questions.row_R, questions.history_end_R
    packs = plan_packs(row_R, end_R, model.windows, _PACK_REQUESTS)
    row_P = row_R[packs.order_R[packs.offsets_P1[:-1]]]
    newest_P = end_R[packs.order_R[packs.offsets_P1[1:] - 1]]
    row_U, first_U, num_U = np.unique(row_P, return_index=True, return_counts=True)
    start_U = model.windows.history_start(newest_P[first_U]) * model.windows.merge_size
    longest_U = np.minimum(newest_P[first_U + num_U - 1] - start_U, model.windows.max_history_events)
    most_asked_U = np.maximum.reduceat(np.diff(packs.offsets_P1), first_U)
    for users in budget.users(longest_U, most_asked_U):
        users = users[np.argsort(-num_U[users], kind="stable")]
        mine = row_U[users]
        last_B = newest_P[first_U[users] + num_U[users] - 1]
        with stage("encode"):
            sweep = Sweep(model, questions.histories.slice_events(mine, start_U[users], last_B))
        for wave in range(num_U[users[0]]):
            packs_B = first_U[users[num_U[users] > wave]] + wave
            chosen = packs.take(packs_B)
            row = np.repeat(np.arange(len(chosen)), np.diff(chosen.offsets_P1))
            with stage("encode"):
                sweep.advance(newest_P[packs_B])
                asked = sweep.ask(row, end_R[chosen.order_R], questions.request_ts_R[chosen.order_R])
            yield chosen.order_R, asked


@torch.inference_mode()
def score_lists(
    questions: Questions,
    candidates: Candidates,
    budget: Budget,
    turn: AbstractContextManager = ALONE,
    before_sweep: Callable[[], None] = lambda: None,
) -> Float32:
    """[C, T] outputs of every request's own candidates, in their order, in the way that costs less; computed in one's `turn`."""
    outputs_CT = np.empty((int(candidates.offsets_R1[-1]), len(budget.model.tasks)), np.float32)
    if not len(questions):
        return outputs_CT
    if not budget.model.settings.is_appendable:
        packed = Packed.of(budget.model, questions, candidates, _STATELESS_PACK_REQUESTS)
        read_bytes = budget.read_bytes(int(packed.num_events_P.max()))
        packed = packed.cut(budget.pack_tokens(read_bytes))
        cost_P = _bytes(packed, budget) + read_bytes * packed.num_candidates_P
        score_packed(packed, cost_P, budget.num_bytes, outputs_CT, turn)
        return outputs_CT
    packed = Packed.of(budget.model, questions, candidates, _PACK_REQUESTS).cut(budget.pack_tokens())
    if packs_pay(packed):
        score_packed(packed, _bytes(packed, budget), budget.num_bytes, outputs_CT, turn)
    else:
        with turn:
            before_sweep()
            score_swept(questions, candidates, budget, outputs_CT)
    return outputs_CT


def packs_pay(packed: Packed) -> bool:
    """Whether packs cost less than a sweep. Costs are events and candidates, known before anything is computed."""
    if not has_kernels(packed.model.norm_head.weight):  # a CPU gains nothing by fewer launches
        return False
    same_user_P = np.append(False, packed.row_P[1:] == packed.row_P[:-1])
    reached_P = np.where(same_user_P, np.roll(packed.end_P, 1), packed.start_P)
    swept_P = packed.end_P - np.maximum(packed.start_P, reached_P) + packed.num_candidates_P
    return bool((packed.num_events_P + packed.num_candidates_P).sum() <= _PACKED_GAIN * swept_P.sum())


def _bytes(packed: Packed, budget: Budget) -> Int64:
    return budget.pack_bytes(packed.num_events_P, packed.num_requests_P, packed.num_candidates_P)


def score_swept(questions: Questions, candidates: Candidates, budget: Budget, outputs_CT: Float32) -> None:
    """Writes the outputs of all candidates."""
    for rows, asked in waves(questions, budget):
        picked_C, chosen = candidates_of(candidates, rows)
        if len(picked_C):
            with stage("score"):
                outputs_CT[picked_C] = _outputs(asked, chosen, budget).float().cpu().numpy()


def _outputs(asked: Asked, candidates: Candidates, budget: Budget) -> Tensor:
    """[C, T] on the device, block by block."""
    offsets, device = candidates.offsets_R1, asked.last_event_ts_R.device
    features = feature_tensors(candidates, device)
    block, total = budget.candidates(asked.num_groups), int(offsets[-1])
    parts = []
    for begin in range(0, total, block):
        end = min(begin + block, total)
        first, last = np.searchsorted(offsets, [begin, end - 1], side="right") - 1
        inside = np.clip(offsets[first : last + 2], begin, end) - begin
        part = {name: values[begin:end] for name, values in features.items()}
        parts.append(asked.outputs(int(first), int(last) + 1, inside, part))
    return torch.cat(parts)


def score_all(asked: Asked, items: dict[str, Tensor], budget: Budget) -> Iterator[tuple[int, Tensor]]:
    """Every item for every request: the first item of each block, and the outputs [R, block, T], on the device."""
    num_requests, num_items = len(asked.row_R), len(items["item_id"])
    block = max(1, budget.candidates(asked.num_groups) // num_requests)
    for begin in range(0, num_items, block):
        some = {name: values[begin : begin + block].repeat(num_requests) for name, values in items.items()}
        size = min(block, num_items - begin)
        offsets = np.arange(num_requests + 1) * size
        yield begin, asked.outputs(0, num_requests, offsets, some).view(num_requests, size, -1)


def best_items(asked: Asked, items: dict[str, Tensor], top_k: int, budget: Budget) -> tuple[Int64, Float32]:
    """Each request's best items by the first task, best first, ties in the items' order: numbers [R, k], outputs [R, k, T].

    A block's scores join the best so far and are forgotten, so the scores of all items are never held.
    """
    num_requests, num_tasks, device = len(asked.row_R), len(budget.model.tasks), asked.last_event_ts_R.device
    best_RkT = torch.empty(num_requests, 0, num_tasks, device=device)
    number_Rk = torch.empty(num_requests, 0, dtype=torch.int64, device=device)
    for begin, outputs_RIT in score_all(asked, items, budget):
        number_RI = torch.arange(begin, begin + outputs_RIT.shape[1], device=device).expand(num_requests, -1)
        outputs_RIT = torch.cat([best_RkT, outputs_RIT], dim=1)
        order_Rk = outputs_RIT[..., 0].sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        number_Rk = torch.cat([number_Rk, number_RI], dim=1).gather(1, order_Rk)
        best_RkT = outputs_RIT.gather(1, order_Rk[..., None].expand(-1, -1, num_tasks))
    return number_Rk.cpu().numpy(), best_RkT.float().cpu().numpy()
