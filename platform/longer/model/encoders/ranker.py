"""Any encoder of a history in the place of LONGER: the same embeddings, heads, interaction features, trainer and batches.

C candidates, E events, D width.
"""

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from longer.model.context import take_rows
from longer.model.embedding import Embedding
from longer.model.encoders.bucket import Bucket, buckets, readable
from longer.model.inputs import BatchTensors, on
from longer.model.ranker import Ranker
from longer.model.recompute import run

if TYPE_CHECKING:
    from longer.model.encoders.transformer import UserEmbeddingEncoder


class SequenceEncoder(nn.Module):
    """Reads histories for candidates. `output_width` is the width of what it returns."""

    output_width: int
    recent_events: int | None = None
    """Read the newest this many events only."""
    reads_events: bool = True
    """Whether gradients reach the event vectors that it is given."""

    def cells_per_slot(self, longest: int, num_candidates: int) -> int:
        """Numbers that the widest step has for a slot of a history: of histories of at most `longest` slots, read by so many."""
        return self.output_width

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        """[N, A, output_width]: one vector a candidate; also for one that sees no event, and without a NaN.

        `embedding` made the bucket's vectors; some encoders ask it for parts of an event.
        """
        raise NotImplementedError


class EncoderRanker(Ranker):
    """The candidate's token x and what the encoder read for it, r, through the heads that LONGER has: over [x, r, x * r]."""

    encoder: SequenceEncoder | None
    recompute: bool = False

    def _make_encoder(self) -> None:
        from longer.model.encoders.factory import make_encoder  # which makes rankers itself: a tower trained upstream

        own, width = self.embedding, self.settings.width
        own.merge = nn.Identity()  # type: ignore[assignment]  # every event is a group of its own
        self.encoder = make_encoder(self.settings, self.schema, self.tasks, own.request_D)
        if not (self.encoder and self.encoder.reads_events):  # data-parallel training counts on gradients
            for unread in (own.event_categories, own.event_numbers, own.gap, own.hour):
                unread.requires_grad_(False)
        if self.encoder is not None:
            self.read, self.read_width = nn.Linear(self.encoder.output_width, width), 2 * width

    @property
    def upstream(self) -> Ranker:
        """The frozen user tower of the encoder `user_embedding`."""
        return cast("UserEmbeddingEncoder", self.encoder).upstream

    def set_recompute(self, recompute: bool) -> None:
        """Whether the encoder forgets its activations, some histories at a time, and computes them again in the backward pass."""
        self.recompute = recompute

    def cells_per_candidate(self, num_events: int) -> int:
        """A share of what its encoder holds for very many."""
        longest, many = max(1, num_events), 1 << 16
        return longest * self.encoder.cells_per_slot(longest, many) // many if self.encoder else 0

    def forward(self, batch: BatchTensors) -> Tensor:
        """[C, tasks]: logits of binary tasks, values of regression tasks, for every candidate of every request."""
        x_CD, features_CF = self.entered(batch)
        globals_RMD = self.embedding.user_globals(batch.histories.user_key_B[batch.row_R])
        y_CD = x_CD + take_rows(globals_RMD.sum(1).to(x_CD.dtype), batch.request_of_candidate_C)
        beside = [] if features_CF is None else [features_CF]
        if self.encoder is not None:
            read_CD = self.read(self.encode(self.encoder, batch, x_CD))
            beside += [read_CD, read_CD * y_CD.to(read_CD.dtype)]
        return self.leave(y_CD, torch.cat(beside, dim=-1) if beside else None, batch.candidates["item_id"])

    def encode(self, encoder: SequenceEncoder, batch: BatchTensors, x_CD: Tensor) -> Tensor:
        """[C, output_width]: the history as each candidate, `x_CD` with what is known of its request, reads it."""
        batch = readable(batch, self.windows, encoder.recent_events)
        x_ED = self.embedding.groups(self.embedding.events(batch.histories)[:, None])
        parts, order = [x_CD.new_zeros(0, encoder.output_width)], [np.zeros(0, np.int64)]
        found = buckets(batch, self.windows, x_ED, x_CD, encoder.recent_events, encoder.cells_per_slot)
        has_randomness = self.settings.dropout > 0 and self.training
        for bucket, asked, candidates in found:
            read = run(encoder, bucket, self.embedding, recompute=self.recompute, has_randomness=has_randomness)
            parts.append(read.flatten(0, 1).index_select(0, asked).to(x_CD.dtype))
            order.append(candidates)
        (back_C,) = on(x_CD.device, np.argsort(np.concatenate(order), kind="stable"))
        return torch.cat(parts).index_select(0, back_C)
