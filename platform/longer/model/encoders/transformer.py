"""Encoders that read every event against every other: the causal Transformer, HSTU, and a user tower with its frozen offspring.

B histories, L events, N tiles, A candidates of a tile, D width, H heads, Z head width.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longer.model.attention import Block
from longer.model.embedding import CANDIDATE_STD, Embedding
from longer.model.encoders.bucket import Bucket
from longer.model.encoders.ranker import SequenceEncoder
from longer.model.variants import attend_and_self
from longer.model_settings import ModelSettings

if TYPE_CHECKING:
    from longer.model.ranker import Ranker


class CausalLayers(nn.Module):
    """Transformer layers over histories, each event seeing those up to itself. Positions are slots: only differences matter."""

    def __init__(self, settings: ModelSettings, num_layers: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(settings.width, settings.num_heads, settings.feed_forward_ratio, settings.dropout)
            for _ in range(num_layers)
        )

    def __iter__(self) -> Any:
        return iter(cast("list[Block]", list(self.blocks)))

    @staticmethod
    def layer(block: Block, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The events after the layer, and their keys and values in it."""
        slot_BL = torch.arange(x_BLD.shape[1], device=x_BLD.device).expand(x_BLD.shape[:2])
        query, (key, value) = block.queries(x_BLD, slot_BL), block.keys_values(x_BLD, slot_BL)
        q, k, v = (x.transpose(1, 2) for x in (query, key.to(query.dtype), value.to(query.dtype)))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        return block.finish(x_BLD, attended), key, value


class TransformerEncoder(SequenceEncoder):
    """A causal Transformer over the events; each candidate is one more token at its request's end, which nothing else sees.

    Like LONGER it begins as a search for the candidate's own events, and a learned vector tells candidates from events.
    """

    def __init__(self, settings: ModelSettings, num_layers: int):
        super().__init__()
        self.output_width = settings.width
        self.layers = CausalLayers(settings, num_layers)
        self.norm = nn.LayerNorm(settings.width)
        self.candidate_D = nn.Parameter(torch.randn(settings.width) * CANDIDATE_STD)
        next(iter(self.layers)).begin_as_search(self.candidate_D)

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        x_BLD, x_NAD, seen_NAL = bucket.x_BLD, bucket.x_NAD + self.candidate_D, bucket.seen_NAL
        for block in self.layers:
            x_BLD, key, value = self.layers.layer(block, x_BLD)
            query, (own_key, own_value) = block.queries(x_NAD, bucket.end_NA), block.keys_values(x_NAD, bucket.end_NA)
            key, value = key.index_select(0, bucket.row_N), value.index_select(0, bucket.row_N)
            x_NAD = block.finish(x_NAD, attend_and_self(query, own_key, own_value, key, value, seen_NAL))
        return self.norm(x_NAD)


class UserTowerEncoder(SequenceEncoder):
    """The newest event's vector of a causal Transformer, u, meets the candidate's vector v in u * v only (arXiv 2205.04507)."""

    def __init__(self, settings: ModelSettings, num_layers: int):
        super().__init__()
        self.output_width = settings.width
        self.layers = CausalLayers(settings, num_layers)
        self.norm = nn.LayerNorm(settings.width)
        self.candidate = nn.Linear(settings.width, settings.width)

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        return self.user_vectors(bucket, bucket.x_BLD) * self.candidate(bucket.x_NAD)

    def user_vectors(self, bucket: Bucket, x_BLD: Tensor) -> Tensor:
        """[N, A, D]: what the tower knows of the user at each candidate's request; zeros without any event."""
        for block in self.layers:
            x_BLD, _, _ = self.layers.layer(block, x_BLD)
        u_NAD = self.norm(x_BLD)[bucket.row_N[:, None], (bucket.end_NA - 1).clamp_min(0)]
        return u_NAD * (bucket.end_NA > bucket.begin_NA)[..., None]


class UserEmbeddingEncoder(SequenceEncoder):
    """The vector that a user tower, trained upstream and frozen, has of the user: the same for every candidate."""

    reads_events = False

    def __init__(self, settings: ModelSettings, upstream: "Ranker"):
        super().__init__()
        self.output_width = settings.width
        self.upstream = upstream.requires_grad_(False)

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        histories, upstream = bucket.batch.histories, self.upstream.embedding
        with torch.no_grad():
            features = {name: bucket.of_events(values) for name, values in histories.features.items()}
            x_BLd = upstream.vectors(features, bucket.event_ts_BL, bucket.of_events(histories.previous_ts_E()))
            x_BLD = upstream.groups(x_BLd.flatten(0, 1)[:, None]).view(*x_BLd.shape[:2], -1)
            tower = cast(UserTowerEncoder, self.upstream.encoder)
            return tower.user_vectors(bucket, x_BLD)


class HstuEncoder(SequenceEncoder):
    """Hierarchical Sequential Transduction Units (arXiv 2402.17152, eqs. 1 to 3); each candidate is one more token at its end.

    U, V, Q, K = split(silu(f1(x)));  A V = silu(Q K' + rab) V / n;  y = f2(norm(A V) * U). The relative bias rab is a learned
    number for the distance in events plus one for the distance in time, both by half octaves; n is the window's length.
    """

    def __init__(self, settings: ModelSettings, num_layers: int):
        super().__init__()
        self.output_width = settings.width
        self.layers = nn.ModuleList(HstuLayer(settings) for _ in range(num_layers))
        self.norm = nn.LayerNorm(settings.width)

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        x_BLD, x_NAD = bucket.x_BLD, bucket.x_NAD
        slot_L, ts_BL = torch.arange(x_BLD.shape[1], device=x_BLD.device), bucket.event_ts_BL
        seen_LL = slot_L[:, None] >= slot_L
        between_events = (
            half_octave(slot_L[:, None] - slot_L),
            half_octave((ts_BL[:, :, None] - ts_BL[:, None]) // 1000),
        )
        ts_N1L, seen_NAL = ts_BL.index_select(0, bucket.row_N)[:, None], bucket.seen_NAL
        to_events = (
            half_octave(bucket.end_NA[..., None] - slot_L),
            half_octave((bucket.request_ts_NA[..., None] - ts_N1L) // 1000),
        )
        itself = seen_LL.new_zeros(1, 1, 1, dtype=torch.uint8), seen_LL.new_zeros(1, 1, 1, dtype=torch.uint8)
        is_last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            layer = cast(HstuLayer, layer)
            _, value, query, key = events = layer.project(x_BLD)
            own = layer.project(x_NAD)
            row_key, row_value = key.index_select(0, bucket.row_N), value.index_select(0, bucket.row_N)
            gathered = layer.attend(own[2], row_key, row_value, to_events, seen_NAL)
            score_NAH = torch.einsum("nahz,nahz->nah", own[2], own[3]) + layer.bias(*itself)[0, 0]
            gathered = gathered + (F.silu(score_NAH) * layer.scale)[..., None] * own[1]
            x_NAD = layer.finish(x_NAD, gathered, own[0])
            if number < is_last:  # nothing reads what events would gather in the last
                x_BLD = layer.finish(x_BLD, layer.attend(query, key, value, between_events, seen_LL), events[0])
        return self.norm(x_NAD)


class HstuLayer(nn.Module):
    def __init__(self, settings: ModelSettings):
        super().__init__()
        width, self.num_heads = settings.width, settings.num_heads
        self.scale = 1 / settings.history_events
        self.norm_input = nn.LayerNorm(width)
        self.f1 = nn.Linear(width, 4 * width)
        self.norm_gathered = nn.LayerNorm(width)
        self.f2 = nn.Linear(width, width)
        self.by_distance = nn.Parameter(torch.randn(_NUM_DISTANCES) * 0.02)
        self.by_time = nn.Parameter(torch.randn(_NUM_DISTANCES) * 0.02)
        self.dropout = nn.Dropout(settings.dropout)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """U, V, Q and K, each [..., H, Z]."""
        return F.silu(self.f1(self.norm_input(x))).unflatten(-1, (4, self.num_heads, -1)).unbind(-3)

    def bias(self, distance: Tensor, time: Tensor) -> Tensor:
        """[..., 1]: a bias that all heads share."""
        return (Bias.apply(self.by_distance, distance) + Bias.apply(self.by_time, time))[..., None]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, distances: tuple[Tensor, Tensor], seen: Tensor
    ) -> Tensor:
        """[..., H, Z]: pointwise attention, silu(QK' + rab) V / n over what is seen."""
        score_BHTS = torch.einsum("bthz,bshz->bhts", query, key)
        bias_BTS = self.bias(*distances)[..., 0].to(score_BHTS.dtype)
        seen_BTS = seen if seen.ndim == 3 else seen[None]
        weights = F.silu(score_BHTS + bias_BTS.unsqueeze(-3)) * (seen_BTS[:, None].to(score_BHTS.dtype) * self.scale)
        return torch.einsum("bhts,bshz->bthz", weights, value)

    def finish(self, x: Tensor, gathered: Tensor, gate: Tensor) -> Tensor:
        return x + self.dropout(self.f2(self.norm_gathered(gathered.flatten(-2)) * gate.flatten(-2)))


_NUM_DISTANCES = 64


def half_octave(distance: Tensor) -> Tensor:
    """Class of a distance, uint8: 0 for none, then by half octaves."""
    return (
        (1 + 2 * distance.clamp_min(1).float().log2()).clamp_max(_NUM_DISTANCES - 1).mul(distance > 0).to(torch.uint8)
    )


class Bias(torch.autograd.Function):
    """`table[classes]`, whose gradient counts classes instead of adding to a few addresses millions of times."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, classes: Tensor) -> Tensor:
        ctx.save_for_backward(classes)
        ctx.like = table
        return table[classes.long()]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (classes,) = ctx.saved_tensors
        table = torch.bincount(classes.flatten(), gradient.flatten(), minlength=_NUM_DISTANCES)
        return table.to(ctx.like.dtype), None
