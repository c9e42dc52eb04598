"""Attention inside groups of K events, one head, in one kernel on CUDA: so few keys that matrix products are mostly launches.

N groups, K events in a group, d width.
"""

from typing import Any

import torch
from torch import Tensor

from longer.arrays import power_of_two
from longer.model.fuse import has_kernels

_MOST_EVENTS = 64
"""Of a group that the kernel serves: a tile holds whole groups."""


def attend_in_groups(qkv_NKd: Tensor, exists_NK: Tensor | None) -> Tensor:
    """[N, K, d]: every event gathers over the existing events of its group; of a group without any nothing is promised.

    `qkv_NKd` holds queries, keys and values, side by side.
    """
    if qkv_NKd.shape[1] == 1 and exists_NK is None:
        return qkv_NKd.chunk(3, dim=-1)[2]  # all of a weight of one
    if has_kernels(qkv_NKd) and qkv_NKd.shape[1] <= _MOST_EVENTS and exists_NK is not None and len(qkv_NKd):
        return _GroupAttention.apply(qkv_NKd, exists_NK)
    return by_products(qkv_NKd, exists_NK)


def by_products(qkv_NKd: Tensor, exists_NK: Tensor | None) -> Tensor:
    """The same in plain PyTorch."""
    query, key, value = qkv_NKd.chunk(3, dim=-1)
    scores_NKK = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if exists_NK is not None:
        scores_NKK = scores_NKK.masked_fill(~exists_NK[:, None, :], torch.finfo(scores_NKK.dtype).min)
    return scores_NKK.softmax(dim=-1).to(value.dtype) @ value


class _GroupAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_NKd: Tensor, exists_NK: Tensor) -> Tensor:
        from longer.model.group_attention_triton import group_attention_kernel

        qkv_NKd, exists_NK = qkv_NKd.contiguous(), exists_NK.contiguous()
        ctx.save_for_backward(qkv_NKd, exists_NK)
        num_groups, group_size, width = *qkv_NKd.shape[:2], qkv_NKd.shape[2] // 3
        out_NKd = qkv_NKd.new_empty(num_groups, group_size, width)
        grid, sizes = _launch(num_groups, group_size, width, qkv_NKd.dtype)
        group_attention_kernel[grid](qkv_NKd, exists_NK, out_NKd, num_groups, width**-0.5, **sizes)
        return out_NKd

    @staticmethod
    def backward(ctx: Any, d_out_NKd: Tensor) -> tuple[Tensor, None]:
        from longer.model.group_attention_triton import group_attention_gradient_kernel

        qkv_NKd, exists_NK = ctx.saved_tensors
        d_qkv_NKd = torch.empty_like(qkv_NKd)
        num_groups, group_size, width = d_out_NKd.shape
        grid, sizes = _launch(num_groups, group_size, width, qkv_NKd.dtype)
        group_attention_gradient_kernel[grid](
            qkv_NKd, exists_NK, d_out_NKd.contiguous(), d_qkv_NKd, num_groups, width**-0.5, **sizes
        )
        return d_qkv_NKd, None


def _launch(num_groups: int, group_size: int, width: int, dtype: torch.dtype) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the sizes of a tile: as many whole groups as it holds."""
    block_m = max(32 if dtype == torch.float32 else 64, power_of_two(group_size))
    groups = block_m // group_size
    block_d = max(16, power_of_two(width))
    sizes = {"K": group_size, "D": width, "GROUPS": groups, "BLOCK_M": block_m, "BLOCK_D": block_d, "num_warps": 4}
    return (-(-num_groups // groups),), sizes
