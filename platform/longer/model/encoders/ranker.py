"""Any encoder of a history in the place of LONGER: the same embeddings, heads, interaction features, trainer and batches.

C candidates, E events, D width.
"""

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from longer.model.context import take_rows
from longer.model.embedding import Embedding
from longer.model.encoders.bucket import Bucket, buckets
from longer.model.inputs import BatchTensors
from longer.model.padded import on
from longer.model.ranker import Ranker

if TYPE_CHECKING:
    from longer.model.encoders.transformer import UserEmbeddingEncoder


class SequenceEncoder(nn.Module):
    """Reads histories for candidates. `output_width` is the width of what it returns."""

    output_width: int
    recent_events: int | None = None
    """Read the newest this many events only."""
    reads_events: bool = True
    """Whether gradients reach the event vectors that it is given."""

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        """[N, A, output_width]: one vector a candidate; also for one that sees no event, and without a NaN.

        `embedding` made the bucket's vectors; some encoders ask it for parts of an event.
        """
        raise NotImplementedError


class EncoderRanker(Ranker):
    """The candidate's token, the user's and what the encoder read, through the heads that LONGER has."""

    encoder: SequenceEncoder | None

    def _make_encoder(self) -> None:
        from longer.model.encoders.factory import make_encoder  # which makes rankers itself: a tower trained upstream

        self.encoder = make_encoder(self.settings, self.schema, self.tasks)
        if not (self.encoder and self.encoder.reads_events):  # data-parallel training counts on gradients
            own = self.embedding
            for unread in (own.event_categories, own.event_numbers, own.gap, own.hour):
                unread.requires_grad_(False)
        if self.encoder is not None:
            self.read = nn.Linear(self.encoder.output_width, self.settings.width)

    @property
    def upstream(self) -> Ranker:
        """The frozen user tower of the encoder `user_embedding`."""
        return cast("UserEmbeddingEncoder", self.encoder).upstream

    def forward(self, batch: BatchTensors) -> Tensor:
        """[C, tasks]: logits of binary tasks, values of regression tasks, for every candidate of every request."""
        request_C = batch.request_of_candidate_C
        last_ts_R = batch.histories.last_ts_R(batch.row_R, batch.history_end_R)
        request_RD = self.embedding.requests(batch.request_ts_R, last_ts_R)
        features_CF = self.batch_interactions(batch, request_C, request_RD.dtype)
        x_CD = self.enter(request_RD, request_C, features_CF, batch.candidates)
        globals_RMD = self.embedding.user_globals(batch.histories.user_key_B[batch.row_R])
        y_CD = x_CD + take_rows(globals_RMD.sum(1).to(x_CD.dtype), request_C)
        if self.encoder is not None:
            y_CD = y_CD + self.read(self.encode(self.encoder, batch))
        return self.leave(y_CD, features_CF, batch.candidates["item_id"])

    def encode(self, encoder: SequenceEncoder, batch: BatchTensors) -> Tensor:
        """[C, output_width]: the history as each candidate reads it."""
        x_ED = self.embedding.groups(self.embedding.events(batch.histories)[:, None])
        x_CD = self.embedding.candidates(batch.candidates)
        parts, order = [x_CD.new_zeros(0, encoder.output_width)], [np.zeros(0, np.int64)]
        for bucket, asked_NA, candidates in buckets(batch, self.windows, x_ED, x_CD, encoder.recent_events):
            parts.append(encoder(bucket, self.embedding)[asked_NA].to(x_CD.dtype))
            order.append(candidates)
        (back_C,) = on(x_CD.device, np.argsort(np.concatenate(order), kind="stable"))
        return torch.cat(parts).index_select(0, back_C)
