"""Lists scored by the model's own forward pass: for encoders that keep no user state. C candidates, R requests, P packs."""

import numpy as np
import torch

from longer.arrays import Candidates, Float32, Histories, Int64, RequestBatch
from longer.data.batches import plan_packs
from longer.model.inputs import to_tensors
from longer.model.ranker import Ranker

_PACK_REQUESTS = 64
_COST_PER_BATCH = 1 << 15
"""Events and candidates scored together."""


@torch.inference_mode()
def score_lists_plainly(
    model: Ranker,
    histories: Histories,
    row_R: Int64,
    history_end_R: Int64,
    request_ts_R: Int64,
    candidates: Candidates,
) -> Float32:
    """[C, T] outputs of every request's own candidates, in their order; requests that agree on a history share it."""
    windows, device = model.windows, model.norm_head.weight.device
    packs = plan_packs(row_R, history_end_R, windows, _PACK_REQUESTS)
    outputs_CT = np.empty((int(candidates.offsets_R1[-1]), len(model.tasks)), np.float32)
    sizes_R = np.diff(candidates.offsets_R1)
    newest_P = packs.order_R[packs.offsets_P1[1:] - 1]
    start_P = windows.history_start(history_end_R[newest_P]) * windows.merge_size
    asked_P = np.add.reduceat(sizes_R[packs.order_R], packs.offsets_P1[:-1]) if len(packs) else sizes_R[:0]
    cost_P = history_end_R[newest_P] - start_P + asked_P
    by_cost = np.argsort(cost_P, kind="stable")
    for members in np.split(by_cost, np.flatnonzero(np.diff(np.cumsum(cost_P[by_cost]) // _COST_PER_BATCH)) + 1):
        if not len(members):
            continue
        chosen = packs.take(members)
        requests, newest = chosen.order_R, newest_P[members]
        lengths = sizes_R[requests]
        offsets = np.append(np.int64(0), np.cumsum(lengths))
        picked_C = np.repeat(candidates.offsets_R1[requests] - offsets[:-1], lengths) + np.arange(offsets[-1])
        batch = RequestBatch(
            histories=histories.slice_events(row_R[newest], start_P[members], history_end_R[newest]),
            row_R=np.repeat(np.arange(len(chosen)), np.diff(chosen.offsets_P1)),
            history_end_R=history_end_R[requests],
            request_ts_R=request_ts_R[requests],
            candidates=Candidates(offsets, {name: values[picked_C] for name, values in candidates.features.items()}),
            request_id_R=requests,
        )
        if len(picked_C):
            outputs_CT[picked_C] = model(to_tensors(batch, device)).float().cpu().numpy()
    return outputs_CT
