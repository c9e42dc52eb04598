"""The transformer block, rotary positions, and attention over a context that many queries share.

B histories, T tokens, D width, W width inside the feed-forward part, H heads, Z = D/H width of a head, G context groups (padded),
P queries in all histories, Q queries of one history, S private keys of a query, A = G + S keys that a query weighs.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longer.model.fuse import fused_on_cuda, has_kernels
from longer.model.recompute import run

_BASE = 10_000.0
"""Of the angles' geometric series."""
_ROTATED_SHARE = 4
"""One in so many pairs of channels is turned."""
SEARCH_SCALE = 16.0
"""Attention logit of two equal tokens where a layer begins as a search; unlike ones spread around 0."""


class Rotation(nn.Module):
    """Rotary position (arXiv 2104.09864) of absolute group indices: scores depend on differences only.

    A quarter of the pairs of channels turn, and none in a layer that searches (`Block.make_search`). The others let a token find
    what is like it at any distance: where all turn, an equal item a thousand groups ago scores little more than any other. Angles
    are taken in float64 and reduced there, so that a user's billionth event is placed as exactly as the first.
    """

    def __init__(self, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.num_turned = -(-head_width // 2 // _ROTATED_SHARE)

    def forward(self, x_THZ: Tensor, position_T: Tensor) -> Tensor:
        """Turn pairs of channels by position; leading dimensions of `x` and `position` agree."""
        return rotate(x_THZ, *self.turn(position_T, x_THZ.dtype))

    def turn(self, position_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position's angles, in float32 at least: the same for all layers that turn alike."""
        made = _frequencies if torch.compiler.is_compiling() else _kept_frequencies  # a compiled function keeps its own
        frequencies = made(self.head_width // 2, self.num_turned, position_T.device)
        return _turn(position_T, frequencies, torch.promote_types(dtype, torch.float32))


def _frequencies(num_pairs: int, num_turned: int, device: torch.device) -> Tensor:
    """Not a buffer of the module, which would lose its float64 when the model is cast."""
    frequencies = [_BASE ** (-i / num_turned) for i in range(num_turned)] + [0.0] * (num_pairs - num_turned)
    return torch.tensor(frequencies, dtype=torch.float64, device=device)


_kept_frequencies = cache(_frequencies)


@fused_on_cuda
def _turn(position_T: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = position_T.to(torch.float64)[..., None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_THZ: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels turned by angles of these cosines and sines."""
    even, odd = x_THZ.chunk(2, dim=-1)
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1).to(x_THZ.dtype)


class Block(nn.Module):
    """A pre-norm transformer layer whose queries and keys come separately, so that keys can be kept."""

    def __init__(self, width: int, num_heads: int, feed_forward_ratio: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, feed_forward_ratio * width), nn.GELU(), nn.Linear(feed_forward_ratio * width, width)
        )
        self.dropout = nn.Dropout(dropout)
        self.rotation = Rotation(width // num_heads)
        self.recompute = False
        self.joined: tuple[Tensor, Tensor] | None = None

    def join_projections(self) -> None:
        """Keeps one matrix and bias of queries, keys and values, which training would not keep up to date."""
        weight, bias = self._projections()
        self.joined = weight.detach(), bias.detach()

    def _projections(self) -> tuple[Tensor, Tensor]:
        both = self.query, self.key_value
        return torch.cat([linear.weight for linear in both]), torch.cat([linear.bias for linear in both])

    @torch.no_grad()
    def make_search(self, mark_D: Tensor) -> None:
        """A token's score begins as its likeness to the other (`search_weight`), at any distance: no pair turns.

        The search is blind to `mark_D`, which only candidates bear. Values begin to carry it, in all channels of all heads alike:
        what a candidate gathers of itself is the less the more its history drew, and what all heads found adds up.
        """
        width = len(mark_D)
        same_DD = search_weight(width // self.num_heads, mark_D)
        self.query.weight.copy_(same_DD)
        self.key_value.weight[:width].copy_(same_DD)
        self.key_value.weight[width:].add_(mark_D / mark_D.square().sum())
        nn.init.zeros_(self.query.bias)
        nn.init.zeros_(self.key_value.bias)
        self.rotation.num_turned = 0

    def run(self, layer: Callable[..., Tensor], *args: Any) -> Tensor:
        """`layer(*args)`; with `recompute`, what happens inside is not kept for the gradient but computed once more."""
        has_randomness = self.dropout.p > 0 and self.training
        return run(layer, *args, recompute=self.recompute, has_randomness=has_randomness)

    def queries(self, x_TD: Tensor, position_T: Tensor) -> Tensor:
        """[..., H, Z], rotated."""
        return self.rotation(self._heads(self.query(self.norm_attention(x_TD))), position_T)

    def keys_values(self, x_TD: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor]:
        """Two of [..., H, Z], the keys rotated: what a user state keeps."""
        key, value = self.key_value(self.norm_attention(x_TD)).chunk(2, dim=-1)
        return self.rotation(self._heads(key), position_T), self._heads(value)

    @fused_on_cuda
    def project(self, x_TD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens that are both, [..., H, Z]: one product."""
        weight, bias = self.joined or self._projections()
        query, key, value = F.linear(self.norm_attention(x_TD), weight, bias).chunk(3, dim=-1)
        return rotate(self._heads(query), cos, sin), rotate(self._heads(key), cos, sin), self._heads(value)

    @fused_on_cuda
    def project_queries(self, x_TD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(self._heads(self.query(self.norm_attention(x_TD))), cos, sin)

    @fused_on_cuda
    def project_keys_values(self, x_TD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.key_value(self.norm_attention(x_TD)).chunk(2, dim=-1)
        return rotate(self._heads(key), cos, sin), self._heads(value)

    @fused_on_cuda
    def project_last(
        self, x_TD: Tensor, num_queries: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries of the last tokens, keys and values of all, and a copy of the last tokens: gradients of all meet in one place."""
        normed_TD = self.norm_attention(x_TD)
        key, value = self.key_value(normed_TD).chunk(2, dim=-1)
        last = [x.narrow(0, len(x_TD) - num_queries, num_queries) for x in (normed_TD, cos, sin, x_TD)]
        query = rotate(self._heads(self.query(last[0])), last[1], last[2])
        return query, rotate(self._heads(key), cos, sin), self._heads(value), last[3].clone()

    def finish(self, x_TD: Tensor, attended_TD: Tensor) -> Tensor:
        """The rest of the layer, given what the queries gathered."""
        wide = cast(nn.Linear, self.feed_forward[0])
        if not has_kernels(x_TD) or wide.weight.dtype != torch.bfloat16:
            return self._finish(x_TD, attended_TD)
        # Weights in bf16 serve and do not learn: their product and GELU are one kernel, which takes GELU's tanh form, 5e-4 from
        # the other at most.
        x_TD, normed_TD = self._before_wide(x_TD, attended_TD)
        hidden_TW = torch._addmm_activation(wide.bias, normed_TD, wide.weight.t(), use_gelu=True)
        return self._after_wide(x_TD, hidden_TW)

    @fused_on_cuda
    def _finish(self, x_TD: Tensor, attended_TD: Tensor) -> Tensor:
        x_TD = x_TD + self.dropout(self.output(attended_TD))
        return x_TD + self.dropout(self.feed_forward(self.norm_feed_forward(x_TD)))

    @fused_on_cuda
    def _before_wide(self, x_TD: Tensor, attended_TD: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = x_TD + self.output(attended_TD)
        return x_TD, self.norm_feed_forward(x_TD).to(torch.bfloat16)

    @fused_on_cuda
    def _after_wide(self, x_TD: Tensor, hidden_TW: Tensor) -> Tensor:
        return x_TD + self.feed_forward[2](hidden_TW)

    def _heads(self, x_TD: Tensor) -> Tensor:
        return x_TD.unflatten(-1, (self.num_heads, -1))


def search_weight(head_width: int, blind_to_D: Tensor) -> Tensor:
    """[D, D]: first weight of both queries and keys with which attention is a search for tokens like the one that asks.

    From random weights it must be found by chance that equal items should score high, which long histories of rare items do not
    teach in any number of steps that one would wait for.
    """
    same_DD = torch.eye(len(blind_to_D)) - torch.outer(blind_to_D, blind_to_D) / blind_to_D.square().sum()
    return same_DD * (SEARCH_SCALE / math.sqrt(head_width)) ** 0.5


def attend_groups(query_BTHZ: Tensor, key_BGHZ: Tensor, value_BGHZ: Tensor, visible_BTG: Tensor) -> Tensor:
    """Attention of padded group rows to padded groups, [B, T, D]. Every row must see at least one key, padding included."""
    out_BHTZ = F.scaled_dot_product_attention(
        query_BTHZ.transpose(1, 2), key_BGHZ.transpose(1, 2), value_BGHZ.transpose(1, 2), attn_mask=visible_BTG[:, None]
    )
    return out_BHTZ.transpose(1, 2).flatten(-2)


def attend_shared(
    query_PHZ: Tensor,
    keys_B: Iterable[Tensor],
    values_B: Iterable[Tensor],
    num_queries_B: list[int],
    num_visible_P: Tensor,
    private_key_PSHZ: Tensor,
    private_value_PSHZ: Tensor,
    private_visible_PS: Tensor,
) -> Tensor:
    """Exact softmax attention of each query over its history's groups together with its own private keys, [P, D].

    Queries lie flat, sorted by history: the first `num_queries_B[0]` read the first of `keys_B` and `values_B` (each
    [G, H, Z], G as the history has it), and so on. Query p sees the first `num_visible_P[p]` groups of its history and those
    private keys (its request's newest group and globals, itself) that `private_visible_PS` allows, at least one key in all. No
    key is copied per query and no query is padded.
    """
    query_PHZ = query_PHZ / math.sqrt(query_PHZ.shape[-1])
    private_PHS = (
        (query_PHZ[:, None] * private_key_PSHZ).sum(-1).transpose(1, 2)
    )  # so few keys that matrix products are slower
    private_PHS = private_PHS.masked_fill(~private_visible_PS[:, None], -torch.inf)
    query_HPZ = query_PHZ.transpose(0, 1)
    from_shared, private_weights = [query_HPZ[:, :0]], [private_PHS[:0]]
    per_row = zip(
        keys_B,
        values_B,
        query_HPZ.split(num_queries_B, dim=1),
        num_visible_P.split(num_queries_B),
        private_PHS.split(num_queries_B),
        strict=True,
    )
    for key_GHZ, value_GHZ, query_HQZ, num_visible_Q, private_QHS in per_row:
        if not len(num_visible_Q):
            continue
        num_groups = len(key_GHZ)
        hidden_QG = torch.arange(num_groups, device=query_PHZ.device) >= num_visible_Q[:, None]
        bias_QG = torch.zeros_like(hidden_QG, dtype=query_PHZ.dtype).masked_fill_(hidden_QG, -torch.inf)
        shared_HQG = torch.baddbmm(bias_QG, query_HQZ, key_GHZ.permute(1, 2, 0))
        weights_HQA = torch.cat([shared_HQG, private_QHS.transpose(0, 1)], dim=-1).softmax(dim=-1).to(value_GHZ.dtype)
        from_shared.append(weights_HQA[..., :num_groups] @ value_GHZ.transpose(0, 1))
        private_weights.append(weights_HQA[..., num_groups:].transpose(0, 1))
    from_private_PHZ = (torch.cat(private_weights).transpose(1, 2)[..., None] * private_value_PSHZ).sum(1)
    return (torch.cat(from_shared, dim=1).transpose(0, 1) + from_private_PHZ).flatten(-2)
