"""HSTU: pointwise attention of every event with every other, which can count.

B histories, L events, N tiles, A candidates of a tile, T queries, S keys, D width, H heads, Z head width.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longer.model.attention import search_weight
from longer.model.embedding import Embedding
from longer.model.encoders.bucket import Bucket
from longer.model.encoders.distance import NUM_DISTANCES, Bias, half_octave
from longer.model.encoders.ranker import SequenceEncoder
from longer.model.recompute import run
from longer.model_settings import ModelSettings

_BLOCK_EVENTS = 512
"""Events whose scores are there at once; more are computed in blocks, and again for the gradient, which keeps no L x L matrix."""


class HstuEncoder(SequenceEncoder):
    """Hierarchical Sequential Transduction Units (arXiv 2402.17152, eqs. 1 to 3); each candidate is one more token at its end.

    U, V, Q, K = split(silu(f1(x)));  A V = silu(Q K' + rab) V / n;  y = f2(norm(A V) * U). The relative bias rab is a learned
    number for the distance in events plus one for the distance in time, both by half octaves; n is the window's length.
    """

    def __init__(self, settings: ModelSettings, num_layers: int, request_D: Tensor):
        super().__init__()
        self.output_width, self.num_heads = settings.width, settings.num_heads
        self.layers = nn.ModuleList(HstuLayer(settings) for _ in range(num_layers))
        self.norm = nn.LayerNorm(settings.width)
        cast(HstuLayer, self.layers[0]).begin_as_search(request_D)

    def cells_per_slot(self, longest: int, num_candidates: int) -> int:
        return self.num_heads * (min(longest, _BLOCK_EVENTS) + num_candidates) + 4 * self.output_width

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        x_BLD, x_NAD, seen_NAL = bucket.x_BLD, bucket.x_NAD, bucket.seen_NAL
        slot_L = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        to_events = half_octave(bucket.end_NA[..., None] - slot_L), half_octave(bucket.age_s_NAL)
        itself = torch.zeros(1, 1, 1, dtype=torch.uint8, device=x_BLD.device)
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            layer = cast(HstuLayer, layer)
            gate, value, query, key = layer.project(x_BLD)
            own_gate, own_value, own_query, own_key = layer.project(x_NAD)
            read = key.index_select(0, bucket.row_N), value.index_select(0, bucket.row_N)
            gathered = layer.attend(own_query, *read, to_events, seen_NAL)
            score_NAH = torch.einsum("nahz,nahz->nah", own_query, own_key) + layer.bias(itself, itself)
            gathered = gathered + (F.silu(score_NAH) * layer.scale)[..., None] * own_value
            x_NAD = layer.finish(x_NAD, gathered, own_gate)
            if number < last:  # nothing reads what events would gather in the last
                x_BLD = layer.finish(x_BLD, layer.attend_causally(query, key, value, bucket.event_ts_BL), gate)
        return self.norm(x_NAD)


class HstuLayer(nn.Module):
    def __init__(self, settings: ModelSettings):
        super().__init__()
        width, self.num_heads = settings.width, settings.num_heads
        self.scale = 1 / settings.history_events
        self.block_events = _BLOCK_EVENTS
        self.norm_input = nn.LayerNorm(width)
        self.f1 = nn.Linear(width, 4 * width)
        self.norm_gathered = nn.LayerNorm(
            width, eps=1e-6
        )  # what few events give is small: it is over the window's length
        self.f2 = nn.Linear(width, width)
        self.by_distance = nn.Parameter(torch.randn(NUM_DISTANCES) * 0.02)
        self.by_time = nn.Parameter(torch.randn(NUM_DISTANCES) * 0.02)
        self.dropout = nn.Dropout(settings.dropout)

    @torch.no_grad()
    def begin_as_search(self, request_D: Tensor) -> None:
        """As LONGER's first layer does: queries and keys are the token itself, and scores of unlike tokens begin below 0.

        What silu makes of two unlike tokens is alike in that it is positive. The bias takes off what that comes to, and two
        standard deviations, for channels of a normal distribution.
        """
        width = len(request_D)
        head_width = width // self.num_heads
        same_DD = search_weight(head_width, request_D)
        self.f1.weight[2 * width :] = same_DD.repeat(2, 1)
        nn.init.zeros_(self.f1.bias[2 * width :])
        x = torch.linspace(-5, 5, 1001)
        density, channel = (-x.square() / 2).softmax(0), F.silu(x * same_DD.diagonal().mean())
        mean, square = float(density @ channel), float(density @ channel.square())
        self.by_distance.sub_(head_width * mean**2 + 2 * math.sqrt(head_width * (square**2 - mean**4)))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """U, V, Q and K, each [..., H, Z]."""
        return F.silu(self.f1(self.norm_input(x))).unflatten(-1, (4, self.num_heads, -1)).unbind(-3)

    def bias(self, distance: Tensor, time: Tensor) -> Tensor:
        """A number for each pair of classes, which all heads share."""
        return Bias.apply(self.by_distance, distance) + Bias.apply(self.by_time, time)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, distances: tuple[Tensor, Tensor], seen: Tensor
    ) -> Tensor:
        """[B, T, H, Z]: pointwise attention, silu(QK' + rab) V / n over what is seen."""
        score_BHTS = torch.einsum("bthz,bshz->bhts", query, key)
        bias_BTS = self.bias(*distances).to(score_BHTS.dtype)
        weights = F.silu(score_BHTS + bias_BTS[:, None]) * (seen[:, None].to(score_BHTS.dtype) * self.scale)
        return torch.einsum("bhts,bshz->bthz", weights, value)

    def attend_causally(self, query: Tensor, key: Tensor, value: Tensor, ts_BL: Tensor) -> Tensor:
        """[B, L, H, Z]: of every event with those up to itself."""
        num_events, parts = ts_BL.shape[1], []
        for begin in range(0, num_events, self.block_events):
            end = min(begin + self.block_events, num_events)
            block = query[:, begin:end], key[:, :end], value[:, :end], ts_BL[:, :end]
            parts.append(run(self._attend_block, *block, recompute=num_events > self.block_events))
        return torch.cat(parts, dim=1)

    def _attend_block(self, query: Tensor, key: Tensor, value: Tensor, ts_BS: Tensor) -> Tensor:
        """The newest events, those that ask, against all."""
        slot_S = torch.arange(ts_BS.shape[1], device=ts_BS.device)
        slot_T, ts_BT = slot_S[-query.shape[1] :], ts_BS[:, -query.shape[1] :]
        by_time_BTS = half_octave((ts_BT[:, :, None] - ts_BS[:, None]) // 1000)
        by_distance_1TS = half_octave(slot_T[:, None] - slot_S)[None]
        return self.attend(query, key, value, (by_distance_1TS, by_time_BTS), (slot_T[:, None] >= slot_S)[None])

    def finish(self, x: Tensor, gathered: Tensor, gate: Tensor) -> Tensor:
        return x + self.dropout(self.f2(self.norm_gathered(gathered.flatten(-2)) * gate.flatten(-2)))
