"""SIM and TWIN: search a long history for the events that matter to a candidate, then attend to those alone.

B histories, L events, N tiles, A candidates of a tile, T events found, D width, H heads, Z head width, J side features of events,
d their width, E = 2D numbers of a timed event, or, of side features, events in all histories.
"""

import math

import torch
from torch import Tensor, nn

from longer.encoder_settings import Sim, Twin
from longer.model.attention import SEARCH_SCALE, search_weight
from longer.model.context import take_rows
from longer.model.embedding import Embedding, Gap
from longer.model.encoders.bucket import Bucket
from longer.model.encoders.distance import NUM_DISTANCES, Bias, half_octave
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
def _begin_as_search(query: nn.Linear, key: nn.Linear, head_width: int, request_D: Tensor) -> None:
    """As LONGER's first layer does, so that what is compared is what they read. What else keys are made of comes last."""
    width = len(request_D)
    for linear in (query, key):
        linear.weight[:, :width] = search_weight(head_width, request_D)


def _by_head(linear: nn.Linear, num_heads: int) -> Tensor:
    """[H, Z, E]: a head's part of the weight."""
    return linear.weight.unflatten(0, (num_heads, -1))


class ExactSearchUnit(nn.Module):
    """SIM's eqs. 4 and 5: H heads attend to some events, each concatenated with its distance in time to the request.

    Keys and values are linear in those E = 2D numbers, so that a head asks and gathers in them: no event is projected.
    """

    def __init__(self, width: int, num_heads: int, request_D: Tensor):
        super().__init__()
        self.num_heads = num_heads
        self.gap = Gap(width)
        self.key = nn.Linear(2 * width, width, bias=False)
        self.query = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(2 * width, width, bias=False)
        _begin_as_search(self.query, self.key, width // num_heads, request_D)

    def forward(self, bucket: Bucket, slot_NAT: Tensor, found_NAT: Tensor) -> Tensor:
        """[N, A, D] over the slots found."""
        event_NATD = gather(bucket.x_BLD, bucket.row_N, slot_NAT)
        event_ts_NAT = gather(bucket.event_ts_BL, bucket.row_N, slot_NAT)
        request_ts_NAT = bucket.request_ts_NA[..., None].expand(event_ts_NAT.shape)
        gap_NATD = self.gap(request_ts_NAT, torch.where(found_NAT, event_ts_NAT, request_ts_NAT))
        timed_NATE = torch.cat([event_NATD, gap_NATD.to(event_NATD.dtype)], dim=-1)
        query_NAHZ = self.query(bucket.x_NAD).unflatten(-1, (self.num_heads, -1))
        asked_NAHE = torch.einsum("nahz,hze->nahe", query_NAHZ, _by_head(self.key, self.num_heads))
        score_NAHT = torch.einsum("nahe,nate->naht", asked_NAHE, timed_NATE) / math.sqrt(query_NAHZ.shape[-1])
        weights = softmax_over(score_NAHT, found_NAT[:, :, None])
        gathered_NAHE = torch.einsum("naht,nate->nahe", weights.to(timed_NATE.dtype), timed_NATE)
        return torch.einsum("nahe,hze->nahz", gathered_NAHE, _by_head(self.value, self.num_heads)).flatten(-2)


class SimEncoder(SequenceEncoder):
    """Search-based Interest Model (arXiv 2006.05639).

    The general search unit keeps `top_events`: by equal category, the newest (hard search), or by the inner product
    r_i = (W_b e_i)(W_a e_a) (soft search, eq. 1), whose weighted sum U_r of all events is then a part of the output, so that the
    search learns from the same labels. The exact search unit attends to what was found. The short-term branch, DIEN in the paper,
    is another such unit over the `short_events` newest.

    Other than in the paper: the exact unit's values are projected; the soft search has no loss of its own, only what
    reaches it through U_r; relevance is over the root of the width, and U_r over the root of the window's length.
    """

    def __init__(self, settings: ModelSettings, encoder: Sim, request_D: Tensor):
        super().__init__()
        width, num_heads = settings.width, settings.num_heads
        self.soft, self.field = encoder.search == "soft", encoder.field
        self.top_events, self.short_events = encoder.top_events, encoder.short_events
        self.scale = settings.history_events**-0.5
        if self.soft:
            self.search_event, self.search_candidate = (nn.Linear(width, width, bias=False) for _ in range(2))
            _begin_as_search(self.search_candidate, self.search_event, width, request_D)
            with (
                torch.no_grad()
            ):  # what is found is the same; in the sum U_r, an equal event begins to count about once
                self.search_event.weight /= SEARCH_SCALE
        self.long, self.short = (ExactSearchUnit(width, num_heads, request_D) for _ in range(2))
        self.output_width = (3 if self.soft else 2) * width

    def cells_per_slot(self, longest: int, num_candidates: int) -> int:
        share_found = min(1.0, (self.top_events + self.short_events) / longest)
        return max(1, int(num_candidates * max(8, 2 * self.output_width * share_found)))

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        short_NAD = self.short(bucket, *newest(bucket.seen_NAL, self.short_events))
        if not self.soft:
            wanted_NA1 = bucket.candidate_feature_NA(self.field)[..., None]
            of_events_NL = bucket.event_feature_BL(self.field).index_select(0, bucket.row_N)
            matches = (of_events_NL[:, None] == wanted_NA1) & bucket.seen_NAL & (wanted_NA1 != 0)
            return torch.cat([self.long(bucket, *newest(matches, self.top_events)), short_NAD], dim=-1)
        relevance_NAL = self.relevance(bucket.x_NAD, bucket.x_NLD) * bucket.seen_NAL
        everything_NAD = torch.einsum("nal,nld->nad", relevance_NAL, bucket.x_NLD.to(relevance_NAL.dtype)) * self.scale
        found = most_alike(relevance_NAL.detach(), bucket.seen_NAL, self.top_events)
        return torch.cat([everything_NAD, self.long(bucket, *found), short_NAD], dim=-1)

    def relevance(self, x_NAD: Tensor, x_NLD: Tensor) -> Tensor:
        """[N, A, L], over the root of the width; W_b is applied to candidates, which are fewer than events."""
        asked_NAD = self.search_candidate(x_NAD) @ self.search_event.weight
        return asked_NAD @ x_NLD.to(asked_NAD.dtype).transpose(1, 2) / math.sqrt(x_NAD.shape[-1])


class TwinEncoder(SequenceEncoder):
    """Two-stage Interest Network (arXiv 2302.02352): a = (K_h W_h)(q W_q)' / sqrt(d) + (K_c W_c) b (eq. 5), both for the search
    and, through a softmax over the `top_events` found, for attention (eq. 7).

    K_h is what belongs to an event's item, which can be computed once an item; K_c are the event's own side features and its age
    at the request, each reduced to one number that biases the score. The search takes the mean over the heads.
    """

    def __init__(self, settings: ModelSettings, encoder: Twin, schema: EventSchema, request_D: Tensor):
        super().__init__()
        width, self.num_heads, self.top_events = settings.width, settings.num_heads, encoder.top_events
        self.categories = ("action", *schema.features_of("event", "categorical"))
        self.numbers = schema.features_of("event", "numeric")
        self.key = nn.Linear(width, width, bias=False)
        self.query = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        _begin_as_search(self.query, self.key, width // self.num_heads, request_D)
        self.cross = nn.ModuleList(
            nn.Linear(settings.event_width, 1, bias=False) for _ in (*self.categories, *self.numbers, "gap", "hour")
        )
        self.beta_HJ = nn.Parameter(torch.randn(self.num_heads, len(self.cross)) * 0.05)
        self.by_age = nn.Parameter(torch.randn(NUM_DISTANCES) * 0.02)
        self.beta_of_age_H = nn.Parameter(torch.ones(self.num_heads))
        self.output_width = width

    def cells_per_slot(self, longest: int, num_candidates: int) -> int:
        return max(1, int(num_candidates * max(2 * self.num_heads, self.output_width * self.top_events / longest)))

    def forward(self, bucket: Bucket, embedding: Embedding) -> Tensor:
        score_NHAL = self.scores(bucket, embedding)
        slot_NAT, found_NAT = most_alike(score_NHAL.detach().mean(1), bucket.seen_NAL, self.top_events)
        score_NHAT = score_NHAL.gather(-1, slot_NAT[:, None].expand(-1, self.num_heads, -1, -1))
        weights = softmax_over(score_NHAT, found_NAT[:, None])
        event_NATD = gather(bucket.x_BLD, bucket.row_N, slot_NAT)
        gathered_NHAD = torch.einsum("nhat,natd->nhad", weights.to(event_NATD.dtype), event_NATD)
        return torch.einsum("nhad,hzd->nahz", gathered_NHAD, _by_head(self.value, self.num_heads)).flatten(-2)

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
        age_NAL = Bias.apply(self.by_age, half_octave(bucket.age_s_NAL)).to(inherent_NHAL.dtype)
        of_age_NHAL = age_NAL[:, None] * self.beta_of_age_H[:, None, None].to(age_NAL.dtype)
        return inherent_NHAL + bias_BLH.index_select(0, bucket.row_N).transpose(1, 2)[:, :, None] + of_age_NHAL
