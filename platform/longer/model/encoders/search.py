"""SIM and TWIN: search a long history for the events that matter to a candidate, then attend to those alone.

B histories, L events, N tiles, A candidates of a tile, T events found, D width, H heads, Z head width, J side features of events.
"""

import math

import torch
from torch import Tensor, nn

from longer.encoder_settings import Sim, Twin
from longer.model.attention import search_weight
from longer.model.context import take_rows
from longer.model.embedding import Embedding, Gap
from longer.model.encoders.bucket import Bucket
from longer.model.encoders.ranker import SequenceEncoder
from longer.model_settings import ModelSettings
from longer.schema import EventSchema


def newest(matches_NAL: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """[N, A, T] slots of the newest matches, and which of them there are."""
    place_NAL = torch.arange(1, matches_NAL.shape[-1] + 1, device=matches_NAL.device) * matches_NAL
    place_NAT, slot_NAT = place_NAL.topk(min(top, matches_NAL.shape[-1]), dim=-1)
    return slot_NAT, place_NAT > 0


def most_alike(score_NAL: Tensor, seen_NAL: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """[N, A, T] slots of the best scores among the events that are seen, and which of them there are."""
    score_NAT, slot_NAT = (
        score_NAL.float().masked_fill(~seen_NAL, -torch.inf).topk(min(top, score_NAL.shape[-1]), dim=-1)
    )
    return slot_NAT, score_NAT > -torch.inf


def gather(x_BLD: Tensor, row_N: Tensor, slot_NAT: Tensor) -> Tensor:
    """[N, A, T, ...]: these slots of each tile's history."""
    place_NAT = row_N[:, None, None] * x_BLD.shape[1] + slot_NAT
    return take_rows(x_BLD.flatten(0, 1), place_NAT) if x_BLD.ndim > 2 else x_BLD.flatten()[place_NAT]


def softmax_over(score: Tensor, found: Tensor) -> Tensor:
    """Softmax over the last dimension where something was found, zeros where nothing was."""
    return score.masked_fill(~found, torch.finfo(score.dtype).min).softmax(-1) * found


@torch.no_grad()
def _begin_as_search(query: nn.Linear, key: nn.Linear, head_width: int) -> None:
    """As LONGER's first layer does, so that what is compared is what they read."""
    for linear in (query, key):
        linear.weight.copy_(search_weight(len(linear.weight), head_width))


class SimEncoder(SequenceEncoder):
    """Search-based Interest Model (arXiv 2006.05639).

    The general search unit keeps `top_events`: by equal category, the newest (hard search), or by the inner product
    r_i = (W_b e_i)(W_a e_a) (soft search, eq. 1), whose weighted sum U_r of all events is then a part of the output, so that the
    search learns from the same labels. The exact search unit attends to what was found, each event concatenated with its distance
    in time to the request, with H heads (eqs. 4 and 5).
    """

    def __init__(self, settings: ModelSettings, encoder: Sim):
        super().__init__()
        width, self.num_heads = settings.width, settings.num_heads
        self.search, self.field, self.top_events = encoder.search, encoder.field, encoder.top_events
        self.scale = settings.history_events**-0.5
        self.soft = self.search == "soft"
        if self.soft:
            self.search_event, self.search_candidate = (nn.Linear(width, width, bias=False) for _ in range(2))
            _begin_as_search(self.search_event, self.search_candidate, width)
        self.gap = Gap(width)
        self.key = nn.Linear(2 * width, width, bias=False)
        self.query = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(2 * width, width, bias=False)
        self.output_width = (2 if self.soft else 1) * width

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        if not self.soft:
            wanted_NA1 = bucket.candidate_feature_NA(self.field)[..., None]
            of_events_NL = bucket.event_feature_BL(self.field).index_select(0, bucket.row_N)
            matches = (of_events_NL[:, None] == wanted_NA1) & bucket.seen_NAL & (wanted_NA1 != 0)
            return self.attend(bucket, *newest(matches, self.top_events))
        relevance_NAL = self.relevance(bucket.x_NAD, bucket.x_NLD) * bucket.seen_NAL
        everything_NAD = torch.einsum("nal,nld->nad", relevance_NAL, bucket.x_NLD.to(relevance_NAL.dtype)) * self.scale
        found = most_alike(relevance_NAL.detach(), bucket.seen_NAL, self.top_events)
        return torch.cat([everything_NAD, self.attend(bucket, *found)], dim=-1)

    def relevance(self, x_NAD: Tensor, x_NLD: Tensor) -> Tensor:
        """[N, A, L], over the root of the width."""
        return self.search_candidate(x_NAD) @ self.search_event(x_NLD).transpose(1, 2) / math.sqrt(x_NAD.shape[-1])

    def attend(self, bucket: Bucket, slot_NAT: Tensor, found_NAT: Tensor) -> Tensor:
        """The exact search unit over the slots found."""
        event_NATD = gather(bucket.x_BLD, bucket.row_N, slot_NAT)
        event_ts_NAT = gather(bucket.event_ts_BL, bucket.row_N, slot_NAT)
        request_ts_NAT = bucket.request_ts_NA[..., None].expand(event_ts_NAT.shape)
        gap_NATD = self.gap(request_ts_NAT, torch.where(found_NAT, event_ts_NAT, request_ts_NAT))
        timed_NAT2D = torch.cat([event_NATD, gap_NATD.to(event_NATD.dtype)], dim=-1)
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1))
            for x in (self.query(bucket.x_NAD), self.key(timed_NAT2D), self.value(timed_NAT2D))
        )
        score_NAHT = torch.einsum("nahz,nathz->naht", query, key) / math.sqrt(query.shape[-1])
        weights = softmax_over(score_NAHT, found_NAT[:, :, None])
        return torch.einsum("naht,nathz->nahz", weights.to(value.dtype), value).flatten(-2)


class TwinEncoder(SequenceEncoder):
    """Two-stage Interest Network (arXiv 2302.02352): a = (K_h W_h)(q W_q)' / sqrt(d) + (K_c W_c) b (eq. 5), both for the search
    and, through a softmax over the `top_events` found, for attention (eq. 7).

    K_h is what belongs to an event's item, which can be computed once an item; K_c are the event's own side features, each reduced
    to one number that biases the score. The search takes the mean over the heads.
    """

    def __init__(self, settings: ModelSettings, encoder: Twin, schema: EventSchema):
        super().__init__()
        width, self.num_heads, self.top_events = settings.width, settings.num_heads, encoder.top_events
        self.categories = ("action", *schema.features_of("event", "categorical"))
        self.numbers = schema.features_of("event", "numeric")
        self.key = nn.Linear(width, width, bias=False)
        self.query = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        _begin_as_search(self.query, self.key, width // self.num_heads)
        self.cross = nn.ModuleList(
            nn.Linear(settings.event_width, 1, bias=False) for _ in (*self.categories, *self.numbers, "gap", "hour")
        )
        self.beta_HJ = nn.Parameter(torch.randn(self.num_heads, len(self.cross)) * 0.05)
        self.output_width = width

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        score_NHAL = self.scores(bucket, embedding)
        slot_NAT, found_NAT = most_alike(score_NHAL.detach().mean(1), bucket.seen_NAL, self.top_events)
        score_NHAT = score_NHAL.gather(-1, slot_NAT[:, None].expand(-1, self.num_heads, -1, -1))
        weights = softmax_over(score_NHAT, found_NAT[:, None])
        value_BLHZ = self.value(bucket.x_BLD).unflatten(-1, (self.num_heads, -1))
        found_NATHZ = gather(value_BLHZ, bucket.row_N, slot_NAT)
        return torch.einsum("nhat,nathz->nahz", weights.to(found_NATHZ.dtype), found_NATHZ).flatten(-2)

    def scores(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        """[N, H, A, L]: the target attention of every candidate with every event."""
        histories = bucket.batch.histories
        item_BLD = bucket.of_events(embedding.candidates(histories.features))
        query, key = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.query(bucket.x_NAD), self.key(item_BLD))
        )
        inherent_NHAL = query @ key.index_select(0, bucket.row_N).transpose(-1, -2) / math.sqrt(query.shape[-1])
        sides = [embedding.event_categories[name](histories.features[name]) for name in self.categories]
        sides += [embedding.event_number(name, histories.features[name]) for name in self.numbers]
        sides += [embedding.gap(histories.event_ts_E, histories.previous_ts_E()), embedding.hour(histories.event_ts_E)]
        side_EJ = torch.cat([reduce(x_Ed) for reduce, x_Ed in zip(self.cross, sides, strict=True)], dim=-1)
        bias_BLH = bucket.of_events(side_EJ @ self.beta_HJ.to(side_EJ.dtype).T)
        return inherent_NHAL + bias_BLH.index_select(0, bucket.row_N).transpose(1, 2)[:, :, None]
