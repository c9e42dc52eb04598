"""Encoders of causal Transformer layers: the full Transformer, and a user tower with its frozen offspring.

B histories, L events, N tiles, A candidates of a tile, D width, H heads, Z head width.
"""

from typing import TYPE_CHECKING, Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longer.model.attention import Block
from longer.model.embedding import Embedding
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
    def keys_values(block: Block, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Of the events in this layer."""
        return block.keys_values(x_BLD, _slots(x_BLD))

    @staticmethod
    def layer(block: Block, x_BLD: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The events after the layer, given their keys and values in it."""
        query = block.queries(x_BLD, _slots(x_BLD))
        q, k, v = (x.transpose(1, 2) for x in (query, key.to(query.dtype), value.to(query.dtype)))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        return block.finish(x_BLD, attended)

    def cells_per_slot(self) -> int:
        """Numbers of an event in the feed-forward layer; attention keeps no matrix."""
        return next(iter(self)).feed_forward[0].out_features


def _slots(x_BLD: Tensor) -> Tensor:
    return torch.arange(x_BLD.shape[1], device=x_BLD.device).expand(x_BLD.shape[:2])


class TransformerEncoder(SequenceEncoder):
    """A causal Transformer over the events; each candidate is one more token at its request's end, which nothing else sees.

    Like LONGER it begins as a search for the candidate's own events.
    """

    def __init__(self, settings: ModelSettings, num_layers: int, request_D: Tensor):
        super().__init__()
        self.output_width, self.num_heads = settings.width, settings.num_heads
        self.layers = CausalLayers(settings, num_layers)
        self.norm = nn.LayerNorm(settings.width)
        next(iter(self.layers)).make_search(request_D)

    def cells_per_slot(self, longest: int, num_candidates: int) -> int:
        return self.layers.cells_per_slot() + 2 * self.num_heads * num_candidates

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        x_BLD, x_NAD, seen_NAL = bucket.x_BLD, bucket.x_NAD, bucket.seen_NAL
        last = len(self.layers.blocks) - 1
        for number, block in enumerate(self.layers):
            key, value = self.layers.keys_values(block, x_BLD)
            query, (own_key, own_value) = block.queries(x_NAD, bucket.end_NA), block.keys_values(x_NAD, bucket.end_NA)
            read = key.index_select(0, bucket.row_N), value.index_select(0, bucket.row_N)
            x_NAD = block.finish(x_NAD, attend_and_self(query, own_key, own_value, *read, seen_NAL))
            if number < last:  # nothing reads what events would gather in the last
                x_BLD = self.layers.layer(block, x_BLD, key, value)
        return self.norm(x_NAD)


class UserTowerEncoder(SequenceEncoder):
    """The newest event's vector of a causal Transformer, u, meets the candidate's vector v in u * v only (arXiv 2205.04507)."""

    def __init__(self, settings: ModelSettings, num_layers: int):
        super().__init__()
        self.output_width = settings.width
        self.layers = CausalLayers(settings, num_layers)
        self.norm = nn.LayerNorm(settings.width)
        self.candidate = nn.Linear(settings.width, settings.width)

    def cells_per_slot(self, longest: int, num_candidates: int) -> int:
        return self.layers.cells_per_slot()

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        return self.user_vectors(bucket, bucket.x_BLD) * self.candidate(bucket.x_NAD)

    def user_vectors(self, bucket: Bucket, x_BLD: Tensor) -> Tensor:
        """[N, A, D]: what the tower knows of the user at each candidate's request; zeros without any event."""
        for block in self.layers:
            x_BLD = self.layers.layer(block, x_BLD, *self.layers.keys_values(block, x_BLD))
        u_NAD = self.norm(x_BLD)[bucket.row_N[:, None], (bucket.end_NA - 1).clamp_min(0)]
        return u_NAD * (bucket.end_NA > bucket.begin_NA)[..., None]


class UserEmbeddingEncoder(SequenceEncoder):
    """The vector that a user tower, trained upstream and frozen, has of the user: the same for every candidate."""

    reads_events = False

    def __init__(self, settings: ModelSettings, upstream: "Ranker"):
        super().__init__()
        self.output_width = settings.width
        self.upstream = upstream.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """What is frozen drops nothing out: a user's vector is the same in every step."""
        super().train(mode)
        self.upstream.eval()
        return self

    def cells_per_slot(self, longest: int, num_candidates: int) -> int:
        return self.tower.layers.cells_per_slot()

    @property
    def tower(self) -> UserTowerEncoder:
        return cast(UserTowerEncoder, self.upstream.encoder)

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        histories, upstream = bucket.batch.histories, self.upstream.embedding
        with torch.no_grad():
            features = {name: bucket.of_events(values) for name, values in histories.features.items()}
            x_BLd = upstream.vectors(features, bucket.event_ts_BL, bucket.of_events(histories.previous_ts_E()))
            x_BLD = upstream.groups(x_BLd.flatten(0, 1)[:, None]).view(*x_BLd.shape[:2], -1)
            return self.tower.user_vectors(bucket, x_BLD)
