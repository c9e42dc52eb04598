"""LONGER as a plain PyTorch trainer has it: padded histories, one dense mask, PyTorch's attention. The yardstick of our own passes.

B requests of one history each, L events, K events in a group, G groups (padded), Q query tokens, C candidates of a request,
d event width, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.model_arms.sizes import DEVICE
from longer.arrays import RequestBatch
from longer.model.attention import Block
from longer.model.group_attention import by_products
from longer.model.inputs import to_tensors
from longer.model.interactions import InteractionIndex
from longer.model.longer import Longer
from longer.model.visibility import CANDIDATE, GLOBAL, GROUP, visible


@dataclass(frozen=True)
class Padded:
    """A batch as a plain trainer has it: every history padded to the longest, on the device."""

    features: dict[str, Tensor]
    event_ts_BL: Tensor
    previous_ts_BL: Tensor
    length_B: Tensor
    user_key_B: Tensor
    request_ts_B: Tensor
    candidates: dict[str, Tensor]
    counts_CF: Tensor
    labels: dict[str, Tensor]


def pad(model: Longer, batch: RequestBatch) -> Padded:
    """Padded to a whole number of groups; counts of candidates are given, which spares this arm their cost."""
    tensors, merge_size = to_tensors(batch, DEVICE), model.windows.merge_size
    histories = tensors.histories
    lengths, row_E = histories.num_events_B, histories.row_E
    longest = -(-int(lengths.max()) // merge_size) * merge_size
    slot_E = torch.arange(len(row_E), device=DEVICE) - histories.offsets_B1[row_E]

    def padded(values_E: Tensor) -> Tensor:
        out = values_E.new_zeros(len(lengths), longest)
        out[row_E, slot_E] = values_E
        return out

    request_C = tensors.request_of_candidate_C
    fields = [tensors.candidates[name] for name in model.interaction_fields]
    counts_CF = InteractionIndex.build(histories, model.interaction_fields).features(
        request_C,
        histories.first_index_B[request_C],
        tensors.history_end_R[request_C],
        tensors.request_ts_R[request_C],
        torch.stack(fields, dim=-1),
        model.settings.count_events,
        torch.float32,
    )
    return Padded(
        {name: padded(x) for name, x in histories.features.items()},
        padded(histories.event_ts_E),
        padded(histories.previous_ts_E()),
        lengths,
        histories.user_key_B,
        tensors.request_ts_R,
        tensors.candidates,
        counts_CF,
        tensors.labels,
    )


def padded_forward(model: Longer, batch: Padded, num_query_groups: int) -> Tensor:
    """[B*C, tasks]: LONGER as a plain implementation has it, `visible` as one dense mask."""
    embedding, windows, num_users = model.embedding, model.windows, len(batch.length_B)
    merge_size, device = windows.merge_size, batch.length_B.device
    exists_BL = torch.arange(batch.event_ts_BL.shape[1], device=device) < batch.length_B[:, None]
    x_BLd = embedding.vectors(batch.features, batch.event_ts_BL, batch.previous_ts_BL)
    in_groups = x_BLd.unflatten(1, (-1, merge_size)).flatten(0, 1)
    exists_NK = exists_BL.view(-1, merge_size)
    if embedding.inner is not None:
        attended = by_products(embedding.inner.project(in_groups), exists_NK)
        in_groups = embedding.inner.finish(in_groups, attended)
    x_BGD = embedding.merge((in_groups * exists_NK[..., None]).flatten(1)).unflatten(0, (num_users, -1))
    num_groups = x_BGD.shape[1]
    asked_B, query_first_B = windows.num_groups(batch.length_B), windows.query_start(batch.length_B)
    query_BQ = query_first_B[:, None] + torch.arange(num_query_groups, device=device)
    inside_BQ = query_BQ.clamp_max(num_groups - 1)
    window_BQD = x_BGD.gather(1, inside_BQ[..., None].expand(-1, -1, x_BGD.shape[-1]))

    last = batch.event_ts_BL.gather(1, (batch.length_B - 1)[:, None])[:, 0]
    x_CD = embedding.candidates(batch.candidates).unflatten(0, (num_users, -1))
    x_CD = x_CD + embedding.requests(batch.request_ts_B, last)[:, None]
    x_CD = x_CD + model.interaction_token(batch.counts_CF).unflatten(0, (num_users, -1))
    globals_BMD = embedding.user_globals(batch.user_key_B)
    num_candidates = x_CD.shape[1]
    own_BXD = torch.cat([globals_BMD, x_CD.to(globals_BMD.dtype)], dim=1)
    kinds = [GLOBAL] * globals_BMD.shape[1] + [CANDIDATE] * num_candidates
    kind_X = torch.tensor(kinds, device=device)
    number_BX = torch.arange(len(kinds), device=device).expand(num_users, -1)
    group_BG = torch.arange(num_groups, device=device).expand(num_users, -1)

    def tokens(groups_BG: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Kind, index, position and existence of some groups and then the user's and candidates' tokens."""
        kind = torch.cat([kind_X.new_full((groups_BG.shape[1],), GROUP), kind_X])
        position = torch.cat([groups_BG, asked_B[:, None].expand(-1, len(kinds))], dim=1)
        exists = torch.cat([groups_BG < asked_B[:, None], torch.ones_like(number_BX, dtype=torch.bool)], dim=1)
        return kind, torch.cat([groups_BG, number_BX], dim=1), position, exists

    def mask(query: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> Tensor:
        seen = visible(query[0][:, None], query[1][:, :, None], key[0], key[1][:, None])
        return seen & (key[3][:, None] | ~query[3][:, :, None])  # padding sees padding, not nothing

    all_groups, window = tokens(group_BG), tokens(query_BQ)
    x_BQD = torch.cat([window_BQD.to(own_BXD.dtype), own_BXD], dim=1)
    for number, layer in enumerate(model.blocks):
        block = layer if isinstance(layer, Block) else None
        assert block is not None
        keys_of, x_key = (
            (all_groups, torch.cat([x_BGD.to(own_BXD.dtype), own_BXD], 1)) if number == 0 else (window, x_BQD)
        )
        query_of = window
        key, value = block.keys_values(x_key, keys_of[2])
        if number == len(model.blocks) - 1:
            x_BQD = x_BQD[:, -num_candidates:]
            query_of = window[0][-num_candidates:], *(x[:, -num_candidates:] for x in window[1:])
        query = block.queries(x_BQD, query_of[2])
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask(query_of, keys_of)[:, None],
        )
        x_BQD = block.finish(x_BQD, out.transpose(1, 2).flatten(-2))
    return model.leave(x_BQD.flatten(0, 1), batch.counts_CF, batch.candidates["item_id"])
