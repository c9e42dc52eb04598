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

    The activation unit a is an MLP over (v, e, v - e, v * e). Its first layer is linear in the first three, so that only their
    product is a matrix of every candidate with every event. The sum is scaled like sum pooling's.
    """

    def __init__(self, settings: ModelSettings, encoder: Din):
        super().__init__()
        self.output_width, self.recent_events = settings.width, encoder.recent_events
        self.scale = settings.history_events**-0.5
        self.hidden = nn.Linear(4 * settings.width, encoder.hidden_width)
        self.activation = nn.PReLU()
        self.weight = nn.Linear(encoder.hidden_width, 1)

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        weight_NAL = self.weights(bucket.x_NAD, bucket.x_NLD) * bucket.seen_NAL
        return torch.einsum("nal,nld->nad", weight_NAL, bucket.x_NLD.to(weight_NAL.dtype)) * self.scale

    def weights(self, x_NAD: Tensor, x_NLD: Tensor) -> Tensor:
        """[N, A, L]: the activation unit of every candidate with every event."""
        of_candidate, of_event, of_difference, of_product = self.hidden.weight.chunk(4, dim=1)
        from_candidate_NAU = nn.functional.linear(x_NAD, of_candidate + of_difference, self.hidden.bias)
        from_event_NLU = nn.functional.linear(x_NLD, of_event - of_difference)
        products_NALU = torch.einsum("nad,ud,nld->nalu", x_NAD, of_product, x_NLD)
        hidden_NALU = products_NALU + from_candidate_NAU[:, :, None] + from_event_NLU[:, None]
        return self.weight(self.activation(hidden_NALU))[..., 0]
