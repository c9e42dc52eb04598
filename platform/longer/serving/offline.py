"""Many requests of many users on one device, in bounded memory: users side by side, each one's requests in time order.

B users, R requests, C candidates in all of them, I items that every request is asked about, P packs, T tasks, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longer.arrays import Candidates, Float32, Histories, Int64
from longer.data.batches import plan_packs
from longer.model.inputs import feature_tensors
from longer.model.longer import Longer
from longer.model.ranker import Ranker
from longer.model.sweep import Asked, Sweep
from longer.serving.plain import score_lists_plainly
from longer.serving.stages import stage

_FLOATS_PER_TOKEN = 24
"""Numbers of the token's width that a layer holds at once: the token, its projections, the feed-forward layer's four."""

_FLOATS_PER_EVENT = 16
"""The same for an event's width, in the transformer inside a group."""

_PACK_REQUESTS = 256
"""Most requests of one user that are asked together: a wave then has work for a GPU, and fewer waves are launched."""


@dataclass(frozen=True)
class Questions:
    """R requests of B users, each about its user's events before `history_end_R`; every history reaches back far enough."""

    histories: Histories
    row_R: Int64
    history_end_R: Int64
    request_ts_R: Int64

    def __len__(self) -> int:
        return len(self.row_R)


@dataclass(frozen=True)
class Budget:
    """How much is computed at once, from the bytes that it may take and from the model's sizes."""

    model: Ranker
    num_bytes: int

    def user_bytes(self, num_events_B: Int64, num_asked_B: Int64) -> Int64:
        """What a user's context takes while it is made: keys and values of every layer, and the events' activations.

        And the tails of `num_asked_B` requests, which are asked together.
        """
        sizes, windows = self.model.settings, self.model.windows
        num_groups_B = num_events_B // windows.merge_size + 1
        num_queries = windows.query_groups + windows.stride_groups
        num_tail_B = num_asked_B * (self.model.embedding.num_globals + 1)
        rows_B = 4 * num_groups_B + (2 * sizes.num_self_layers + _FLOATS_PER_TOKEN) * (num_queries + num_tail_B)
        return 4 * (rows_B * sizes.width + _FLOATS_PER_EVENT * sizes.event_width * num_events_B)

    def users(self, num_events_B: Int64, num_asked_B: Int64) -> list[Int64]:
        """Users of similar length in batches, each in half of the bytes, or one user alone: less padding."""
        by_length = np.argsort(num_events_B, kind="stable")
        batch_B = np.cumsum(self.user_bytes(num_events_B, num_asked_B)[by_length]) // (self.num_bytes // 2)
        return [rows for rows in np.split(by_length, np.flatnonzero(np.diff(batch_B)) + 1) if len(rows)]

    def candidates(self, num_groups: int) -> int:
        """Candidates in the other half. A CPU keeps their attention weights over every group, a GPU does not."""
        sizes = self.model.settings
        weights = 0 if self.model.norm_head.weight.is_cuda else (4 * sizes.num_heads + 2) * num_groups
        tail = 4 * (sizes.num_cls_tokens + 3) * sizes.width
        return max(1, self.num_bytes // 2 // (4 * (_FLOATS_PER_TOKEN * sizes.width + weights + tail)))


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
def score_lists(questions: Questions, candidates: Candidates, budget: Budget) -> Float32:
    """[C, T] outputs of every request's own candidates, in their order."""
    if not budget.model.settings.is_appendable:
        times = questions.row_R, questions.history_end_R, questions.request_ts_R
        return score_lists_plainly(budget.model, questions.histories, *times, candidates)
    outputs_CT = np.empty((int(candidates.offsets_R1[-1]), len(budget.model.tasks)), np.float32)
    for rows_R, asked in waves(questions, budget):
        begins, lengths = candidates.offsets_R1[rows_R], np.diff(candidates.offsets_R1)[rows_R]
        offsets = np.append(np.int64(0), np.cumsum(lengths))
        picked_C = np.repeat(begins - offsets[:-1], lengths) + np.arange(offsets[-1])
        chosen = Candidates(offsets, {name: values[picked_C] for name, values in candidates.features.items()})
        if len(picked_C):
            with stage("score"):
                outputs_CT[picked_C] = _outputs(asked, chosen, budget).float().cpu().numpy()
    return outputs_CT


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
