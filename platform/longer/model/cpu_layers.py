"""One layer of LONGER over tokens that read shared groups, without kernels: each a step whose gradient may need it computed again.

P tail tokens and C candidates of R requests, T tail tokens of a request, S = T + 1, D width, H heads, Z = D/H.
"""

import torch
from torch import Tensor

from longer.model.attention import Block, attend_shared
from longer.model.context import SharedContext, Tail, take_rows


def tail_layer(
    block: Block,
    x_PD: Tensor,
    query_PHZ: Tensor,
    context: SharedContext,
    layer: int,
    num_queries_B: list[int],
    num_visible_P: Tensor,
    key_RTHZ: Tensor,
    value_RTHZ: Tensor,
    sees_PT: Tensor,
) -> Tensor:
    """One layer over all tail tokens, on a CPU."""
    own_key, own_value = (x_RTHZ.repeat_interleave(key_RTHZ.shape[1], dim=0) for x_RTHZ in (key_RTHZ, value_RTHZ))
    shared = context.rows(layer, query_PHZ.dtype)
    attended_PD = attend_shared(query_PHZ, *shared, num_queries_B, num_visible_P, own_key, own_value, sees_PT)
    return block.finish(x_PD, attended_PD)


def candidate_layer(
    block: Block,
    x_CD: Tensor,
    turn: tuple[Tensor, Tensor],
    context: SharedContext,
    layer: int,
    num_queries_B: list[int],
    num_visible_C: Tensor,
    tail: Tail,
    request_C: Tensor,
    sees_CS: Tensor,
) -> Tensor:
    """One layer over all candidates, on a CPU."""
    query_CHZ, key_CHZ, value_CHZ = block.project(x_CD, *turn)
    own_key = torch.cat([take_rows(tail.keys[layer], request_C), key_CHZ[:, None]], dim=1)
    own_value = torch.cat([take_rows(tail.values[layer], request_C), value_CHZ[:, None]], dim=1)
    shared = context.rows(layer, query_CHZ.dtype)
    attended_CD = attend_shared(query_CHZ, *shared, num_queries_B, num_visible_C, own_key, own_value, sees_CS)
    return block.finish(x_CD, attended_CD)
