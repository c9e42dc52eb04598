"""From keys and numbers to vectors: events, groups of events, candidates, user globals and what is known of a request.

B histories, E events, N groups, K events in a group, R requests, C candidates, M user globals, d event width, D = K*d.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longer.arrays import MS_PER_HOUR, NO_EVENT_TS
from longer.model.fuse import fused_on_cuda
from longer.model.group_attention import attend_in_groups
from longer.model.hashed_table import TABLE_STD, HashedTable
from longer.model.inputs import EventTensors
from longer.model.recompute import run
from longer.model.small_tables import read_rows
from longer.model_settings import ModelSettings
from longer.schema import EventSchema

_HOURS_PER_WEEK = 168
_THURSDAY = 72  # 1970-01-01 was a Thursday; the week starts on Monday 00:00 UTC
_NUM_GAPS = 64
_ITEM_STD, _ITEM_SIDE_STD = 0.2, 0.1
"""Of first weights: events of one item begin much alike, those of one category somewhat, whatever else differs."""
CANDIDATE_STD = 0.5
"""Of the first weights of what tells candidates from events."""
_NO_EVENT_TS = int(NO_EVENT_TS)  # a NumPy scalar would break compiled graphs


class Gap(nn.Module):
    """Embedding of a time gap by half octaves of seconds; the last row means 'no event before'."""

    edges_s: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Embedding(_NUM_GAPS + 1, width)
        nn.init.normal_(self.embedding.weight, std=TABLE_STD)
        edges_s = torch.tensor([round(2 ** (i / 2)) for i in range(1, _NUM_GAPS)])
        self.register_buffer("edges_s", edges_s, persistent=False)  # integers: a bin never depends on rounding

    def forward(self, later_ts: Tensor, earlier_ts: Tensor) -> Tensor:
        none_before = earlier_ts == _NO_EVENT_TS
        gap_s = torch.where(none_before, 0, later_ts - earlier_ts) // 1000
        rows = torch.where(none_before, _NUM_GAPS, torch.bucketize(gap_s, self.edges_s, right=True))
        return read_rows(self.embedding.weight, rows)


class HourOfWeek(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Embedding(_HOURS_PER_WEEK, width)
        nn.init.normal_(self.embedding.weight, std=TABLE_STD)

    def forward(self, ts: Tensor) -> Tensor:
        return read_rows(self.embedding.weight, (ts // MS_PER_HOUR + _THURSDAY) % _HOURS_PER_WEEK)


def _number(width: int) -> nn.Linear:
    """Of a numeric feature, no larger than the tables' rows: with torch's own start the numbers drown which item it was."""
    linear = nn.Linear(1, width, bias=False)
    nn.init.normal_(linear.weight, std=TABLE_STD)
    return linear


class InnerTrans(nn.Module):
    """A transformer block inside each group of K events (arXiv 2505.04421, section 3.4); one head.

    It begins as the identity, so that events are what they are alone, as candidates see them.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.norm_feed_forward = nn.LayerNorm(width)
        last = nn.Linear(2 * width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), last)
        for linear in (self.output, last):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_NKd: Tensor, exists_NK: Tensor | None) -> Tensor:
        return self.finish(x_NKd, attend_in_groups(self.project(x_NKd), exists_NK))

    def project(self, x_NKd: Tensor) -> Tensor:
        """[N, K, 3d]: queries, keys and values."""
        return self.query_key_value(self.norm_attention(x_NKd))

    def finish(self, x_NKd: Tensor, attended_NKd: Tensor) -> Tensor:
        """The rest of the block, given what the events gathered."""
        x_NKd = x_NKd + self.output(attended_NKd)
        return x_NKd + self.feed_forward(self.norm_feed_forward(x_NKd))


class PaperEncoding(nn.Module):
    """Time and place as in arXiv 2505.04421, section 3.5.1: a learned place is added, the distance in time to the request is
    concatenated, and both pass through an MLP.

    Candidates pass through the same. Places count back from the request, whose candidates are at 0 and whose newest event is at
    1. Other than in the paper, the MLP is added to its input and begins as zeros, so that an item is much the same as an event
    and as a candidate and the first layer can search for it; and user globals, which are learned whole, have no part in it.
    """

    def __init__(self, width: int, max_events: int):
        super().__init__()
        self.place = nn.Embedding(1 + max_events, width)
        nn.init.normal_(self.place.weight, std=TABLE_STD)
        self.gap = Gap(width)
        last = nn.Linear(2 * width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.feed_forward = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.GELU(), last)

    def forward(self, x_d: Tensor, request_ts: Tensor, event_ts: Tensor, place: Tensor) -> Tensor:
        """Events as a request sees them; leading dimensions agree."""
        x_d = x_d + read_rows(self.place.weight, place)
        return x_d + self.feed_forward(torch.cat([x_d, self.gap(request_ts, event_ts)], dim=-1))

    def candidates(self, x_Cd: Tensor) -> Tensor:
        zero_C = torch.zeros(len(x_Cd), dtype=torch.int64, device=x_Cd.device)
        return self(x_Cd, zero_C, zero_C, zero_C)


@fused_on_cuda
def _events_of_groups(start_N: Tensor, size_N: Tensor, key_E: Tensor, merge_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K]: which events of each group exist, their places (0 where there is none), and their keys."""
    slots_K = torch.arange(merge_size, device=start_N.device)
    exists_NK = slots_K < size_N[:, None]
    event_NK = torch.where(exists_NK, start_N[:, None] + slots_K, 0)
    return exists_NK, event_NK, key_E[event_NK]


class Embedding(nn.Module):
    """Events and candidates in one space: both pass through the same item table, the same encoding and the same merge.

    A candidate is merged as a group of K copies of itself, which keeps item identity through the projection: on ids alone
    K = 4 ranks much better so than with a projection of its own.
    """

    def __init__(self, settings: ModelSettings, schema: EventSchema):
        super().__init__()
        d, width = settings.event_width, settings.width
        self.merge_size = settings.merge_size
        self.num_user_tokens = settings.num_user_tokens
        self.num_globals = settings.num_cls_tokens + settings.num_user_tokens
        self.item = HashedTable(settings.item_rows, d, std=_ITEM_STD)
        self.event_categories = nn.ModuleDict(
            {
                name: HashedTable(settings.categorical_rows, d)
                for name in ("action", *schema.features_of("event", "categorical"))
            }
        )
        self.item_categories = nn.ModuleDict(
            {
                name: HashedTable(settings.categorical_rows, d, std=_ITEM_SIDE_STD)
                for name in schema.features_of("item", "categorical")
            }
        )
        self.event_numbers = nn.ModuleDict({name: _number(d) for name in schema.features_of("event", "numeric")})
        self.item_numbers = nn.ModuleDict({name: _number(d) for name in schema.features_of("item", "numeric")})
        self.gap = Gap(d)
        self.hour = HourOfWeek(d)
        self.norm = nn.LayerNorm(d)
        in_paper, max_events = settings.encoding == "paper", settings.windows.max_history_events
        self.paper = PaperEncoding(d, max_events) if in_paper else None
        self.inner = InnerTrans(d) if settings.inner_transformer else None
        self.merge = nn.Linear(width, width)
        nn.init.eye_(self.merge.weight)  # concatenation itself: a candidate and an event begin alike, slot by slot
        nn.init.zeros_(self.merge.bias)
        own = settings.num_user_tokens * width
        self.user = HashedTable(settings.user_rows, own) if own else None
        self.cls_MD = nn.Parameter(torch.randn(settings.num_cls_tokens, width) * TABLE_STD)
        self.request_gap = Gap(width)
        self.request_hour = HourOfWeek(width)
        self.recompute = False
        self.request_D = nn.Parameter(torch.randn(width) * CANDIDATE_STD)
        of_requests = schema.features_of("request", "categorical")
        self.request_categories = nn.ModuleDict(
            {name: HashedTable(settings.categorical_rows, width) for name in of_requests}
        )
        self.request_numbers = nn.ModuleDict(
            {name: _number(width) for name in schema.features_of("request", "numeric")}
        )

    def events(self, events: EventTensors) -> Tensor:
        """[E, d]: everything that was fixed when each event happened."""
        return self.vectors(events.features, events.event_ts_E, events.previous_ts_E())

    def vectors(
        self,
        features: Mapping[str, Tensor],
        event_ts_E: Tensor,
        previous_ts_E: Tensor,
        id_Ed: Tensor | None = None,
    ) -> Tensor:
        """The same from their parts, in any shape."""
        x_Ed = self._item(features, id_Ed)
        for name, table in self.event_categories.items():
            x_Ed = x_Ed + table(features[name])
        for name in self.event_numbers:
            x_Ed = x_Ed + self.event_number(name, features[name])
        x_Ed = x_Ed + self.gap(event_ts_E, previous_ts_E) + self.hour(event_ts_E)
        return self.norm(x_Ed)

    def event_groups(
        self, features: dict[str, Tensor], event_ts_E: Tensor, previous_ts_E: Tensor, start_N: Tensor, size_N: Tensor
    ) -> Tensor:
        """[N, D]: groups of the `size_N[n]` events from `start_N[n]` on, embedded where they are read: no event is kept.

        There must be an event; what a partial group lacks counts as zeros.
        """
        exists_NK, event_NK, key_NK = _events_of_groups(start_N, size_N, features["item_id"], self.merge_size)
        id_NKd = self.item(key_NK)  # outside of compiled code, which would not note what was read
        args = id_NKd, exists_NK, event_NK, features, event_ts_E, previous_ts_E
        return run(self._read_groups, *args, recompute=self.recompute)

    def _read_groups(self, id_NKd: Tensor, exists_NK: Tensor, *events: Any) -> Tensor:
        x_NKd, qkv_NKd = self._read_events(id_NKd, exists_NK, *events)
        attended_NKd = None if qkv_NKd is None else attend_in_groups(qkv_NKd, exists_NK)
        return self._merge(x_NKd, attended_NKd, exists_NK)

    @fused_on_cuda
    def _read_events(
        self,
        id_NKd: Tensor,
        exists_NK: Tensor,
        event_NK: Tensor,
        features: dict[str, Tensor],
        event_ts_E: Tensor,
        previous_ts_E: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Vectors of the events, zeros where there is none, and their queries, keys and values in InnerTrans."""
        read = {name: values[event_NK] for name, values in features.items()}
        x_NKd = self.vectors(read, event_ts_E[event_NK], previous_ts_E[event_NK], id_NKd) * exists_NK[..., None]
        if self.inner is None:
            return x_NKd, None
        qkv_NKd = self.inner.project(x_NKd)
        return x_NKd.to(qkv_NKd.dtype), qkv_NKd

    @fused_on_cuda
    def _merge(self, x_NKd: Tensor, attended_NKd: Tensor | None, exists_NK: Tensor) -> Tensor:
        if self.inner is not None and attended_NKd is not None:
            x_NKd = self.inner.finish(x_NKd, attended_NKd) * exists_NK[..., None]
        return self.merge(x_NKd.flatten(1))

    def groups(self, x_NKd: Tensor, exists_NK: Tensor | None = None) -> Tensor:
        """[N, D]: K event vectors merged into one token; absent events of a partial group count as zeros."""
        if self.inner is not None:
            x_NKd = self.inner(x_NKd, exists_NK)
        if exists_NK is not None:
            x_NKd = x_NKd * exists_NK[..., None]
        return self.merge(x_NKd.flatten(1))

    def candidates(self, candidates: Mapping[str, Tensor], id_Cd: Tensor | None = None) -> Tensor:
        """[C, D]; `id_Cd` are the rows of the items' table, where they have been read already."""
        x_Cd = self.norm(self._item(candidates, id_Cd))
        if self.paper is not None:
            x_Cd = self.paper.candidates(x_Cd)
        if self.inner is not None:
            x_Cd = self.inner(x_Cd[:, None], None)[:, 0]
        return self.merge(x_Cd.repeat(1, self.merge_size))

    def user_globals(self, user_key_R: Tensor) -> Tensor:
        """[R, M, D]: the learned CLS tokens, then the user's own ones."""
        cls_RMD = self.cls_MD.expand(len(user_key_R), -1, -1)
        if self.user is None:
            return cls_RMD
        return torch.cat([cls_RMD, self.user(user_key_R).unflatten(1, (self.num_user_tokens, -1))], dim=1)

    @fused_on_cuda
    def requests(self, request_ts_R: Tensor, last_event_ts_R: Tensor) -> Tensor:
        """[R, D]: what is known of a request when it is scored, and what tells its candidates from the groups of its history."""
        return self.request_gap(request_ts_R, last_event_ts_R) + self.request_hour(request_ts_R) + self.request_D

    def with_request_features(self, x_CD: Tensor, candidates: Mapping[str, Tensor]) -> Tensor:
        """The candidates, each with its request's own features."""
        for name, table in self.request_categories.items():
            x_CD = x_CD + table(candidates[name])
        for name, linear in self.request_numbers.items():
            x_CD = x_CD + linear(self._squash(candidates[name]))
        return x_CD

    def event_number(self, name: str, values: Tensor) -> Tensor:
        """[..., d]: a numeric feature of events."""
        return self.event_numbers[name](self._squash(values))

    def _item(self, features: Mapping[str, Tensor], id_d: Tensor | None) -> Tensor:
        x_d = self.item(features["item_id"]) if id_d is None else id_d
        for name, table in self.item_categories.items():
            x_d = x_d + table(features[name])
        for name, linear in self.item_numbers.items():
            x_d = x_d + linear(self._squash(features[name]))
        return x_d

    def _squash(self, numbers: Tensor) -> Tensor:
        numbers = numbers.to(self.norm.weight.dtype)
        return (numbers.sign() * numbers.abs().log1p())[..., None]
