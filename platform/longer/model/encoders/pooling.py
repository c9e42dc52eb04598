"""Sum pooling, and DIN. B histories, L events, N tiles, A candidates of a tile, D width, U hidden units."""

import torch
from torch import Tensor, nn

from longer.encoder_settings import Din
from longer.model.embedding import Embedding
from longer.model.encoders.bucket import Bucket
from longer.model.encoders.ranker import SequenceEncoder
from longer.model_settings import ModelSettings


class SumPoolingEncoder(SequenceEncoder):
    """The sum of the events that a candidate sees, over the root of the window's length, which keeps it of a neuron's size."""

    def __init__(self, settings: ModelSettings):
        super().__init__()
        self.output_width = settings.width
        self.scale = settings.history_events**-0.5

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        exact = torch.promote_types(bucket.x_BLD.dtype, torch.float32)
        before_BLD = nn.functional.pad(
            bucket.x_BLD.cumsum(1, dtype=exact), (0, 0, 1, 0)
        )  # a sum is a difference of these
        begin, end = (before_BLD[bucket.row_N[:, None], slot_NA] for slot_NA in (bucket.begin_NA, bucket.end_NA))
        return (end - begin) * self.scale


class DinEncoder(SequenceEncoder):
    """Deep Interest Network (arXiv 1706.06978, eq. 3): the sum of a(e, v) * e over events e for candidate v, without a softmax.

    The activation unit a is an MLP over (v, e, v - e, v * e). Its first layer is linear in e, so that a candidate asks with one
    vector a hidden unit, and only those units are there for every candidate and event. The sum is over the root of the number of
    events that are read.
    """

    def __init__(self, settings: ModelSettings, encoder: Din):
        super().__init__()
        self.output_width, self.recent_events = settings.width, encoder.recent_events
        self.scale = (encoder.recent_events or settings.history_events) ** -0.5
        self.hidden = nn.Linear(4 * settings.width, encoder.hidden_width)
        self.activation = nn.PReLU()
        self.weight = nn.Linear(encoder.hidden_width, 1)
        self._begin_as_search()

    @torch.no_grad()
    def _begin_as_search(self) -> None:
        """As LONGER's first layer does: one hidden unit tells by v * e whether an event is like the candidate.

        It is 2 where they are equal and -2 where they have nothing in common, which PReLU makes -0.5: weights are 2.5 and 0.
        """
        width = self.output_width
        self.hidden.weight[0].zero_()
        self.hidden.weight[0, 3 * width :] = 4 / width
        self.hidden.bias[0] = -2
        self.weight.weight[0, 0] = 1
        self.weight.bias.fill_(0.5)

    def cells_per_slot(self, longest: int, num_candidates: int) -> int:
        return self.hidden.out_features * num_candidates

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        of_candidate, of_event, of_difference, of_product = self.hidden.weight.chunk(4, dim=1)
        from_candidate_NAU = nn.functional.linear(bucket.x_NAD, of_candidate + of_difference, self.hidden.bias)
        asked_NAUD = bucket.x_NAD[:, :, None] * of_product + (of_event - of_difference)
        x_NLD = bucket.x_NLD
        hidden_NAUL = torch.einsum("naud,nld->naul", asked_NAUD, x_NLD) + from_candidate_NAU[..., None]
        weight_NAL = torch.einsum("u,naul->nal", self.weight.weight[0], self.activation(hidden_NAUL)) + self.weight.bias
        return torch.einsum("nal,nld->nad", weight_NAL * bucket.seen_NAL, x_NLD) * self.scale
