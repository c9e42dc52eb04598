"""LONGER with the switches that no user state can follow: other query choices, and the paper's encoding of time and position.

Each request is computed alone, its history window padded among others of similar length, in plain torch. What a token sees is the
same rule (`visibility`); what differs is which tokens are queries and what an event's vector is made of:

- `queries: uniform` takes k groups spread evenly over the window, `recent_uniform` half of them newest and half spread over the
  rest, `learnable` k learned tokens that see what user globals see. Which groups are taken depends on where the windows start,
  as in the appendable encoding, so a longer history has them until the windows move (`chosen_groups`);
- `encoding: paper` puts into every event its distance to the request, in time and in events (`PaperEncoding`), and rotates
  nothing.

R requests, C candidates in all, G groups (padded), K events in a group, Q chosen groups (padded), M globals (learned queries
included), A candidates of a request (padded), S = G + M or Q + M keys, D width, d event width, H heads, Z head width.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longer.arrays import Int64
from longer.model.attention import Block
from longer.model.context import take_rows
from longer.model.inputs import BatchTensors, on
from longer.model.padded import LANES, length_classes, pad_ranges
from longer.model.visibility import CANDIDATE, GLOBAL, GROUP, visible
from longer.model_settings import ModelSettings
from longer.windows import WindowRule

if TYPE_CHECKING:
    from longer.model.longer import Longer

_MAX_GROUPS = 1 << 16
"""Padded groups that are computed together."""


class Variant(nn.Module):
    """The weights that only these query choices have."""

    def __init__(self, settings: ModelSettings):
        super().__init__()
        self.num_queries = settings.query_groups if settings.queries == "learnable" else 0
        self.queries_QD = nn.Parameter(torch.randn(self.num_queries, settings.width) * 0.05)


def chosen_groups(queries: str, windows: WindowRule, group_RG: Int64, history_end_R: Int64) -> np.ndarray:
    """[R, G] bool: which groups, by absolute index, are queries of requests at these ends. Padding is the caller's to cut."""
    first_R1 = windows.history_start(history_end_R)[:, None]
    query_R1 = windows.query_start(history_end_R)[:, None]
    k = windows.query_groups
    if queries == "learnable":
        return np.zeros(group_RG.shape, bool)
    if queries == "recent":
        return group_RG >= query_R1
    recent = k // 2 if queries == "recent_uniform" else 0
    recent_from_R1 = query_R1 + k - recent if recent else np.full_like(query_R1, np.iinfo(np.int64).max)
    spread, over_R1 = k - recent, query_R1 + k - recent - first_R1
    place_RG = group_RG - first_R1
    is_first_of_bin = place_RG * spread // over_R1 != (place_RG - 1) * spread // over_R1
    return is_first_of_bin | (group_RG >= recent_from_R1)


def variant_forward(model: "Longer", batch: BatchTensors) -> Tensor:
    """[C, tasks]: what `Longer.forward` returns."""
    source, windows = batch.source, model.windows
    x_CD, features_CF = model.entered(batch)
    x_Ed = model.embedding.events(batch.histories)
    num_groups_R = windows.num_groups(source.history_end_R) - windows.history_start(source.history_end_R)
    parts, order = [x_CD[:0]], [np.zeros(0, np.int64)]
    for requests in length_classes(num_groups_R, _MAX_GROUPS):
        part_CD, candidates = _some_requests(model, batch, requests, x_Ed, x_CD)
        parts.append(part_CD)
        order.append(candidates)
    (back_C,) = on(x_CD.device, np.argsort(np.concatenate(order), kind="stable"))
    return model.leave(torch.cat(parts).index_select(0, back_C), features_CF, batch.candidates["item_id"])


def _some_requests(
    model: "Longer", batch: BatchTensors, requests: Int64, x_Ed: Tensor, x_CD: Tensor
) -> tuple[Tensor, Int64]:
    """Candidates of some requests as they leave the last layer, and which they are."""
    source, windows, device = batch.source, model.windows, x_CD.device
    end_R = source.history_end_R[requests]
    num_globals = model.embedding.num_globals + model.variant.num_queries
    group_RG, exists_RG = pad_ranges(
        windows.history_start(end_R), windows.num_groups(end_R), multiple=LANES, plus=num_globals
    )
    chosen_RG = chosen_groups(model.settings.queries, windows, group_RG, end_R) & exists_RG
    slot_RQ, is_query_RQ = _compact(chosen_RG, num_globals)
    candidate_RA, asked_RA = pad_ranges(
        source.candidates.offsets_R1[requests], source.candidates.offsets_R1[requests + 1]
    )
    x_RGD = _groups(model, batch, requests, group_RG, x_Ed)
    slots, groups, end, there, query, asked, candidate = on(
        device,
        slot_RQ,
        group_RG,
        windows.num_groups(end_R),
        exists_RG,
        is_query_RQ,
        asked_RA,
        np.where(asked_RA, candidate_RA, 0),
    )
    globals_RMD = model.embedding.user_globals(batch.histories.user_key_B[batch.row_R[on(device, requests)[0]]])
    learned_RQD = model.variant.queries_QD.expand(len(requests), -1, -1)
    globals_RMD = torch.cat([globals_RMD, learned_RQD], dim=1).to(x_RGD.dtype)
    global_RM = end[:, None].expand(-1, num_globals)
    queries_RQD = x_RGD.gather(1, slots[..., None].expand(-1, -1, x_RGD.shape[-1]))
    x_RTD = torch.cat([queries_RQD, globals_RMD], dim=1)
    position_RT, exists_RT = (
        torch.cat([groups.gather(1, slots), global_RM], 1),
        F.pad(query, (0, num_globals), value=True),
    )
    x_RSD = torch.cat([x_RGD, globals_RMD], dim=1)
    position_RS, exists_RS = torch.cat([groups, global_RM], 1), F.pad(there, (0, num_globals), value=True)
    x_RAD = take_rows(x_CD, candidate)
    turn = 0 if model.embedding.paper is not None else 1
    position_RA = end[:, None].expand(candidate.shape) * turn
    for layer, block in enumerate(model.layers):
        if layer > 0:
            x_RSD, position_RS, exists_RS = x_RTD, position_RT, exists_RT
        num_groups = x_RSD.shape[1] - num_globals
        key, value = block.keys_values(x_RSD, position_RS * turn)
        kind_S = _kinds(num_groups, num_globals, device)
        seen = visible(CANDIDATE, position_RA[:, :, None], kind_S, position_RS[:, None, :]) & exists_RS[:, None]
        x_RAD = block.run(_candidates, block, x_RAD, position_RA, key, value, seen)
        if layer < len(model.layers) - 1:
            kind_T = _kinds(slots.shape[1], num_globals, device)
            seen = visible(kind_T[:, None], position_RT[:, :, None], kind_S, position_RS[:, None, :])
            seen = seen & exists_RS[:, None] | ~exists_RT[:, :, None]
            x_RTD = block.run(_tokens, block, x_RTD, position_RT * turn, key, value, seen)
    return x_RAD[asked], candidate_RA[asked_RA]


def _groups(model: "Longer", batch: BatchTensors, requests: Int64, group_RG: Int64, x_Ed: Tensor) -> Tensor:
    """[R, G, D]: every request's groups; those behind its end are of zeros."""
    source, merge_size, device = batch.source, model.windows.merge_size, x_Ed.device
    end_R, row_R = source.history_end_R[requests], source.row_R[requests]
    number_RGK = group_RG[..., None] * merge_size + np.arange(merge_size)
    exists_RGK = number_RGK < end_R[:, None, None]
    base_R = source.histories.offsets_B1[row_R] - source.histories.first_index_B[row_R]
    event_RGK = np.where(exists_RGK, number_RGK + base_R[:, None, None], 0)
    event, exists = on(device, event_RGK, exists_RGK)
    if not len(x_Ed):  # the sum keeps every weight in the graph, which data-parallel training counts on
        x_Ed = x_Ed.sum() * 0 + x_Ed.new_zeros(1, x_Ed.shape[-1])
    x_RGKd = take_rows(x_Ed, event)
    if model.embedding.paper is not None:
        place, each_R = on(device, np.where(exists_RGK, end_R[:, None, None] - number_RGK, 0), requests)
        request_ts = batch.request_ts_R[each_R][:, None, None].expand(event.shape)
        ts_E = batch.histories.event_ts_E
        event_ts = ts_E[event] if len(ts_E) else request_ts
        x_RGKd = model.embedding.paper(x_RGKd, request_ts, event_ts, place)
    x_RGKd = x_RGKd * exists[..., None]
    return model.embedding.groups(x_RGKd.flatten(0, 1), exists.flatten(0, 1)).unflatten(0, event.shape[:2])


def _compact(chosen_RG: np.ndarray, num_globals: int) -> tuple[Int64, np.ndarray]:
    """Slots of each request's chosen groups, oldest first, and which of the padded ones they are."""
    num_R = chosen_RG.sum(axis=1)
    longest = -(-(int(num_R.max(initial=0)) + num_globals) // LANES) * LANES - num_globals
    longest = min(longest, chosen_RG.shape[1])
    slot_RQ = np.argsort(~chosen_RG, axis=1, kind="stable")[:, :longest]
    return slot_RQ, np.arange(longest) < num_R[:, None]


def _kinds(num_groups: int, num_globals: int, device: torch.device) -> Tensor:
    place = torch.arange(num_groups + num_globals, device=device)
    return torch.where(place < num_groups, GROUP, GLOBAL)


def _tokens(
    block: Block, x_RTD: Tensor, position_RT: Tensor, key_RSHZ: Tensor, value_RSHZ: Tensor, seen_RTS: Tensor
) -> Tensor:
    """One layer of groups and globals, each of which sees some of the keys."""
    query, key, value = (x.transpose(1, 2) for x in (block.queries(x_RTD, position_RT), key_RSHZ, value_RSHZ))
    gathered = F.scaled_dot_product_attention(query, key, value.to(query.dtype), attn_mask=seen_RTS[:, None])
    return block.finish(x_RTD, gathered.transpose(1, 2).flatten(-2))


def _candidates(
    block: Block, x_RAD: Tensor, position_RA: Tensor, key_RSHZ: Tensor, value_RSHZ: Tensor, seen_RAS: Tensor
) -> Tensor:
    """One layer of candidates, each of which sees the keys and itself."""
    query, (key, value) = block.queries(x_RAD, position_RA), block.keys_values(x_RAD, position_RA)
    return block.finish(x_RAD, attend_and_self(query, key, value, key_RSHZ, value_RSHZ, seen_RAS))


def attend_and_self(
    query_RAHZ: Tensor,
    own_key_RAHZ: Tensor,
    own_value_RAHZ: Tensor,
    key_RSHZ: Tensor,
    value_RSHZ: Tensor,
    seen_RAS: Tensor,
) -> Tensor:
    """[R, A, D]: softmax attention of each candidate over the keys that it sees and its own."""
    query_RAHZ = query_RAHZ / math.sqrt(query_RAHZ.shape[-1])
    shared_RHAS = torch.einsum("rahz,rshz->rhas", query_RAHZ, key_RSHZ).masked_fill(~seen_RAS[:, None], -torch.inf)
    own_RHA1 = (query_RAHZ * own_key_RAHZ).sum(-1).transpose(1, 2)[..., None]
    weights = torch.cat([shared_RHAS, own_RHA1.to(shared_RHAS.dtype)], dim=-1).softmax(-1).to(value_RSHZ.dtype)
    gathered = torch.einsum("rhas,rshz->rahz", weights[..., :-1], value_RSHZ)
    return (gathered + weights[..., -1].transpose(1, 2)[..., None] * own_value_RAHZ).flatten(-2)
