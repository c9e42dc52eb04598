"""Attention of flat queries over context that many of them share, in one kernel on CUDA: the twin of `attention.attend_shared`.

B histories, N groups of all histories (flat), P queries of all histories, S segments of queries, R requests, T tail tokens of a
request, C queries with an own key, A keys of context, tails and own end to end, J runs of a request's queries, H heads, Z head
width, D = HZ.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from longer.arrays import power_of_two

Pair = tuple[Tensor, Tensor]
"""Keys and values."""

_TILES = 32
"""Laid out by one program."""


@dataclass(frozen=True)
class Readers:
    """Which keys each of P queries may read: the head of its history's groups, some of its request's tail, its own.

    Queries lie in segments: segment s, queries `offsets_S1[s]` to `offsets_S1[s + 1]`, reads history s % B, whose groups are rows
    `key_begin_B` on, `num_keys_B` of them, at most `max_keys`. Queries from `tail_first` on belong to a request each, in runs:
    `request_P` and `sees_PT` (which of its tail's tokens) begin there, and row j of `request_offsets_JR1` holds the requests'
    j-th runs. Queries from `own_first` on have a key of their own. All tensors lie on the device; the ints are known without it.
    """

    offsets_S1: Tensor
    key_begin_B: Tensor
    num_keys_B: Tensor
    max_keys: int
    tail_first: int = 0
    own_first: int = 0
    request_P: Tensor | None = None
    sees_PT: Tensor | None = None
    request_offsets_JR1: Tensor | None = None
    _tiles: dict[int, Pair] = field(default_factory=dict, repr=False)

    @staticmethod
    def of_padded(offsets_B1: Tensor, num_groups: int, **reads: Any) -> "Readers":
        """Readers of contexts padded to `num_groups` and laid end to end, queries sorted by history."""
        begin_B = torch.arange(len(offsets_B1) - 1, device=offsets_B1.device) * num_groups
        return Readers(offsets_B1, begin_B, torch.full_like(begin_B, num_groups), num_groups, **reads)

    def over(self, key_begin_B: Tensor, num_keys_B: Tensor, max_keys: int) -> "Readers":
        """The same queries, of other groups: what is worked out about the queries is shared."""
        return replace(self, key_begin_B=key_begin_B, num_keys_B=num_keys_B, max_keys=max_keys)

    @property
    def num_rows(self) -> int:
        return len(self.key_begin_B)

    @property
    def num_segments(self) -> int:
        return len(self.offsets_S1) - 1

    def tiles(self, num_queries: int, size: int) -> Pair:
        """Segment and first query of each run of up to `size` queries of one segment; on the device, without waiting for it.

        The number of runs is only bounded here, so some at the end start at the last segment's end: they are empty.
        """
        if size not in self._tiles:
            from longer.model.shared_attention_triton import tiles_kernel

            num_tiles = num_queries // size + min(self.num_segments, num_queries)
            # two pieces of memory: kernels are compiled anew for addresses that are not a multiple of 16
            segment, first = (self.offsets_S1.new_empty(num_tiles, dtype=torch.int32) for _ in range(2))
            tiles_kernel[(-(-num_tiles // _TILES),)](
                self.offsets_S1, segment, first, self.num_segments, num_tiles, SIZE=size, BLOCK_T=_TILES, BLOCK_S=128
            )
            self._tiles[size] = segment, first
        return self._tiles[size]


def attend(
    query_PHZ: Tensor,
    context_NHZ: Pair,
    readers: Readers,
    num_visible_P: Tensor,
    tail_RTHZ: Pair | None = None,
    own_CHZ: Pair | None = None,
    scales_NH: Pair | None = None,
) -> Tensor:
    """Exact softmax attention of each query over its history's groups, its request's tail and its own key, [P, D].

    Query p sees the first `num_visible_P[p]` groups of its history, the tail tokens that `readers.sees_PT` allows, and its own
    key if it has one; a query that sees nothing gathers zeros. No key is copied per query and no query is padded.
    float32 (exact products, no TF32), bfloat16 or float16; sums are float32, in a fixed order. Where no gradient is asked for, the
    context may be kept in a shorter type, each head of a key and a value times one of `scales_NH`.
    """
    if not len(query_PHZ):
        return query_PHZ.flatten(-2)
    tail, own = tail_RTHZ or (None, None), own_CHZ or (None, None)
    return _Attention.apply(query_PHZ, *context_NHZ, *tail, *own, readers, num_visible_P, scales_NH).flatten(-2)


def attend_all(
    query_PHZ: Tensor,
    key_AHZ: Tensor,
    value_AHZ: Tensor,
    sizes: tuple[int, int, int],
    readers: Readers,
    num_visible_P: Tensor,
) -> Tensor:
    """`attend` where context, tails and own keys lie one after the other, of these `sizes`: gradients are written in one piece."""
    return _AttentionOfAll.apply(query_PHZ, key_AHZ, value_AHZ, sizes, readers, num_visible_P).flatten(-2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_PHZ: Tensor,
        key_NHZ: Tensor,
        value_NHZ: Tensor,
        tail_key_RTHZ: Tensor | None,
        tail_value_RTHZ: Tensor | None,
        own_key_CHZ: Tensor | None,
        own_value_CHZ: Tensor | None,
        readers: Readers,
        num_visible_P: Tensor,
        scales_NH: Pair | None,
    ) -> Tensor:
        num_tail, has_own = 0 if tail_key_RTHZ is None else tail_key_RTHZ.shape[1], own_key_CHZ is not None
        flat_tail = [None if x is None else x.flatten(0, 1) for x in (tail_key_RTHZ, tail_value_RTHZ)]
        # The kernels do not read what is absent: the queries stand in for it.
        inputs = [
            _packed(query_PHZ if x is None else x)
            for x in (query_PHZ, key_NHZ, value_NHZ, *flat_tail, own_key_CHZ, own_value_CHZ)
        ]
        ctx.reads = reads = _Reads(readers, num_visible_P, num_tail, has_own)
        out_PHZ, lse_PH = _gathered(inputs, reads, scales_NH)
        ctx.save_for_backward(*inputs, out_PHZ, lse_PH)
        return out_PHZ

    @staticmethod
    def backward(ctx: Any, d_out_PHZ: Tensor) -> tuple[Tensor | None, ...]:
        query, *others = ctx.saved_tensors[:7]
        reads = ctx.reads
        d_query, *d_others = (x.new_empty(x.shape) for x in (query, *others))
        has_tail = reads.num_tail > 0 and reads.readers.request_offsets_JR1 is not None
        _write_gradients(ctx.saved_tensors, reads, d_out_PHZ, d_query, d_others)
        d_tail = [x.unflatten(0, (-1, reads.num_tail)) if has_tail else None for x in d_others[2:4]]
        return d_query, *d_others[:2], *d_tail, *(d_others[4:] if reads.has_own else (None, None)), None, None, None


class _AttentionOfAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_PHZ: Tensor,
        key_AHZ: Tensor,
        value_AHZ: Tensor,
        sizes: tuple[int, int, int],
        readers: Readers,
        num_visible_P: Tensor,
    ) -> Tensor:
        assert readers.sees_PT is not None
        key_AHZ, value_AHZ = _packed(key_AHZ), _packed(value_AHZ)
        inputs = [_packed(query_PHZ), *_by_kind(key_AHZ, value_AHZ, sizes)]
        ctx.reads, ctx.sizes = _Reads(readers, num_visible_P, readers.sees_PT.shape[1], True), sizes
        out_PHZ, lse_PH = _gathered(inputs, ctx.reads)
        ctx.save_for_backward(inputs[0], key_AHZ, value_AHZ, out_PHZ, lse_PH)
        return out_PHZ

    @staticmethod
    def backward(ctx: Any, d_out_PHZ: Tensor) -> tuple[Tensor | None, ...]:
        query_PHZ, key_AHZ, value_AHZ, *gathered = ctx.saved_tensors
        d_query, d_key, d_value = (x.new_empty(x.shape) for x in (query_PHZ, key_AHZ, value_AHZ))
        saved = (query_PHZ, *_by_kind(key_AHZ, value_AHZ, ctx.sizes), *gathered)
        _write_gradients(saved, ctx.reads, d_out_PHZ, d_query, _by_kind(d_key, d_value, ctx.sizes))
        return d_query, d_key, d_value, None, None, None


@dataclass(frozen=True)
class _Reads:
    readers: Readers
    num_visible_P: Tensor
    num_tail: int
    has_own: bool


def _by_kind(key_AHZ: Tensor, value_AHZ: Tensor, sizes: tuple[int, int, int]) -> list[Tensor]:
    """Keys and values of context, tails and own, as the kernels take them."""
    return [x for pair in zip(key_AHZ.split(sizes), value_AHZ.split(sizes), strict=True) for x in pair]


def _gathered(inputs: list[Tensor], reads: _Reads, scales_NH: Pair | None = None) -> Pair:
    """What the queries gather, and the logarithm of each one's sum of weights."""
    from longer.model.shared_attention_triton import forward_kernel

    query_PHZ, readers = inputs[0], reads.readers
    num_queries, num_heads, width = query_PHZ.shape
    out_PHZ = query_PHZ.new_empty(query_PHZ.shape)
    lse_PH = query_PHZ.new_empty(num_queries, num_heads, dtype=torch.float32)
    sizes = _sizes(num_queries, readers.num_segments, width, query_PHZ.dtype)
    tiles = readers.tiles(num_queries, sizes["BLOCK_M"])
    has_scale, scales = scales_NH is not None, scales_NH or (lse_PH, lse_PH)
    forward_kernel[(len(tiles[0]), num_heads)](
        *inputs, out_PHZ, lse_PH, *tiles, *_reads(readers, reads.num_visible_P), *scales,
        *_steps(inputs), scales[0].stride(0), *_firsts(readers), 1 / math.sqrt(width),
        H=num_heads, Z=width, T=reads.num_tail, HAS_OWN=reads.has_own, HAS_SCALE=has_scale, **sizes,
    )  # fmt: skip
    return out_PHZ, lse_PH


def _write_gradients(
    saved: tuple[Tensor, ...], reads: _Reads, d_out_PHZ: Tensor, d_query: Tensor, d_others: list[Tensor]
) -> None:
    """Gradients of the queries, and of keys and values of context, tails and own where there are any, each a contiguous place."""
    from longer.model import shared_attention_triton as kernels

    *inputs, out_PHZ, lse_PH = saved
    query, key, value, tail_key, tail_value = inputs[:5]
    readers, num_visible_P, num_tail = reads.readers, reads.num_visible_P, reads.num_tail
    num_queries, num_heads, width = query.shape
    sizes = _sizes(num_queries, readers.num_segments, width, query.dtype, backward=True)
    shape = {"H": num_heads, "Z": width}
    steps, scale, d_out_PHZ = _steps(inputs), 1 / math.sqrt(width), d_out_PHZ.contiguous()
    d_context, d_tail, d_own = d_others[:2], d_others[2:4], d_others[4:]

    delta_PH = torch.empty_like(lse_PH)
    tiles = readers.tiles(num_queries, sizes["BLOCK_M"])
    kernels.query_gradient_kernel[(len(tiles[0]), num_heads)](
        *inputs, out_PHZ, lse_PH, *tiles, *_reads(readers, num_visible_P), d_out_PHZ, delta_PH, d_query, *d_own,
        *steps, *_firsts(readers), scale, **shape, T=num_tail, HAS_OWN=reads.has_own, **sizes,
    )  # fmt: skip

    for place in d_context:  # rows of no history stay zero
        place.zero_()
    num_blocks = (readers.max_keys + sizes["BLOCK_N"] - 1) // sizes["BLOCK_N"]
    if num_blocks:
        kernels.context_gradient_kernel[(num_blocks, num_heads, readers.num_rows)](
            query, key, value, lse_PH, readers.offsets_S1, readers.key_begin_B, readers.num_keys_B, num_visible_P,
            d_out_PHZ, delta_PH, *d_context, *steps[:3], readers.num_rows, scale,
            **shape, KINDS=readers.num_segments // readers.num_rows, **sizes,
        )  # fmt: skip

    if num_tail and readers.request_offsets_JR1 is not None:
        num_runs, num_requests = readers.request_offsets_JR1.shape[0], readers.request_offsets_JR1.shape[1] - 1
        kernels.tail_gradient_kernel[(num_requests, num_heads)](
            query, tail_key, tail_value, lse_PH, readers.request_offsets_JR1, readers.sees_PT, d_out_PHZ, delta_PH,
            *d_tail, steps[0], *steps[3:5], num_requests, readers.tail_first, scale,
            **shape, T=num_tail, RUNS=num_runs, BLOCK_T=max(16, power_of_two(num_tail)),
            BLOCK_M=min(32, sizes["BLOCK_M"]), **{k: v for k, v in sizes.items() if k not in ("BLOCK_M", "BLOCK_N")},
        )  # fmt: skip


def _packed(x: Tensor) -> Tensor:
    """[..., H, Z] with heads and channels next to each other, copied only if they are not."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def _steps(inputs: list[Tensor]) -> list[int]:
    return [x.stride(0) for x in inputs]


def _reads(readers: Readers, num_visible_P: Tensor) -> tuple[Tensor, ...]:
    request_P = num_visible_P if readers.request_P is None else readers.request_P
    sees_PT = num_visible_P if readers.sees_PT is None else readers.sees_PT
    return readers.offsets_S1, readers.key_begin_B, num_visible_P, request_P, sees_PT


def _firsts(readers: Readers) -> tuple[int, int, int]:
    return readers.num_rows, readers.tail_first, readers.own_first


def _sizes(
    num_queries: int, num_segments: int, width: int, dtype: torch.dtype, backward: bool = False
) -> dict[str, Any]:
    """Block sizes: a tile about as tall as a segment has queries, as far as registers last."""
    mean_queries, exact = num_queries / num_segments, dtype == torch.float32
    tallest = 32 if exact or (backward and width > 64) else 64 if backward or mean_queries < 100 else 128
    return {
        "BLOCK_M": min(tallest, 16 if mean_queries <= 16 else 32 if mean_queries <= 32 else tallest),
        "BLOCK_N": 32 if exact else 64,
        "BLOCK_Z": max(16, power_of_two(width)),
        "PRECISION": "ieee",
        "num_warps": 8 if tallest == 128 else 4,
        "num_stages": 2 if exact or backward else 3,
    }
