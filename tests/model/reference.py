"""The contract's sections 4 and 5 as they are written: one request at a time, one dense attention, no cache.

Written apart from the package, from the paper's equations and a model's raw weights: none of its modules is called.

E events, T tokens, G groups, C candidates, M globals, F interaction features, D width, d event width, H heads, Z head
width.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from longer.arrays import NO_EVENT_TS, Candidates, Histories
from longer.model.longer import Longer
from longer.model.ranker import Ranker

_EDGES_S = [round(2 ** (i / 2)) for i in range(1, 64)]
Columns = Mapping[str, np.ndarray]


def reference_outputs(
    model: Longer, histories: Histories, request_ts: np.ndarray, candidates: Candidates
) -> np.ndarray:
    """[C, tasks] of requests asked at the end of each whole history (event 0 on)."""
    return reference_tensors(model, histories, request_ts, candidates).detach().numpy()


def reference_tensors(model: Longer, histories: Histories, request_ts: np.ndarray, candidates: Candidates) -> Tensor:
    """The same with its graph."""
    return _all_requests(model, histories, request_ts, candidates)[0]


def reference_vectors(model: Longer, histories: Histories) -> np.ndarray:
    """[B, D]: each user's own global token as the last layer reads it, at the end of each whole history (event 0 on)."""
    features = {"item_id": np.zeros(0, np.int64)} | {f.name: np.zeros(0, np.int64) for f in model.schema.features}
    nothing = Candidates(np.zeros(len(histories) + 1, np.int64), features)
    return _all_requests(model, histories, np.zeros(len(histories), np.int64), nothing)[1].detach().numpy()


def _all_requests(
    model: Longer, histories: Histories, request_ts: np.ndarray, candidates: Candidates
) -> tuple[Tensor, Tensor]:
    """Outputs, and users' own tokens."""
    raw, answers = Raw(model), []
    for b in range(len(histories)):
        end = int(histories.offsets_B1[b + 1] - histories.offsets_B1[b])
        user = histories.slice_events(np.array([b]), np.array([0]), np.array([end]))
        own = slice(*candidates.offsets_R1[b : b + 2])
        asked = {name: values[own] for name, values in candidates.features.items()}
        answers.append(_one_request(raw, user, int(request_ts[b]), asked))
    outputs, user_tokens = zip(*answers, strict=True)
    return torch.cat(outputs), torch.cat(user_tokens)


class Raw:
    """A model's weights by name, and what the equations make of them."""

    def __init__(self, model: Ranker) -> None:
        self.settings, self.schema, self.weights = model.settings, model.schema, dict(model.named_parameters())

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def row(self, name: str, keys: np.ndarray) -> Tensor:
        table = self.weights[f"{name}.embedding.weight"]
        return table[[0 if key == 0 else int(key) % (len(table) - 1) + 1 for key in keys]]

    def gap(self, name: str, later: np.ndarray, earlier: np.ndarray) -> Tensor:
        """The last row says that there is no event before."""
        gaps_s = [(int(a) - int(b)) // 1000 for a, b in zip(later, earlier, strict=True)]
        rows = [sum(edge <= gap for edge in _EDGES_S) for gap in gaps_s]
        none_before = [64 if b == NO_EVENT_TS else row for b, row in zip(earlier, rows, strict=True)]
        return self.weights[f"{name}.embedding.weight"][none_before]

    def hour(self, name: str, ts: np.ndarray) -> Tensor:
        """Of the week, which begins on Monday; 1970 began on a Thursday."""
        return self.weights[f"{name}.embedding.weight"][[(int(t) // 3_600_000 + 3 * 24) % 168 for t in ts]]

    def number(self, name: str, values: np.ndarray) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        x = torch.from_numpy(values).to(weight.dtype)
        return (x.sign() * (1 + x.abs()).log())[:, None] * weight[:, 0]

    def items(self, features: Columns) -> Tensor:
        x_d = self.row("embedding.item", features["item_id"])
        for name in self.schema.features_of("item", "categorical"):
            x_d = x_d + self.row(f"embedding.item_categories.{name}", features[name])
        for name in self.schema.features_of("item", "numeric"):
            x_d = x_d + self.number(f"embedding.item_numbers.{name}", features[name])
        return x_d

    def event_sides(self, features: Columns, ts_E: np.ndarray, previous_ts_E: np.ndarray) -> list[Tensor]:
        """What an event has beside its item: categories, numbers, the gap before it and its hour."""
        categories = ("action", *self.schema.features_of("event", "categorical"))
        sides = [self.row(f"embedding.event_categories.{name}", features[name]) for name in categories]
        for name in self.schema.features_of("event", "numeric"):
            sides.append(self.number(f"embedding.event_numbers.{name}", features[name]))
        return [*sides, self.gap("embedding.gap", ts_E, previous_ts_E), self.hour("embedding.hour", ts_E)]

    def events(self, user: Histories) -> Tensor:
        """[E, d] of one user."""
        previous_ts_E = np.append(user.prev_event_ts_B, user.event_ts_E)[:-1]
        sides = self.event_sides(user.features, user.event_ts_E, previous_ts_E)
        return self.norm("embedding.norm", sum(sides, self.items(user.features)))

    def in_paper(self, x_Ed: Tensor, request_ts: int, ts_E: np.ndarray, place_E: np.ndarray) -> Tensor:
        """[E, d]: with a learned place, and how long before the request; events before the window have any place."""
        places = self.weights["embedding.paper.place.weight"]
        x_Ed = x_Ed + places[place_E.clip(max=len(places) - 1)]
        distance_Ed = self.gap("embedding.paper.gap", np.full(len(ts_E), request_ts), ts_E)
        return x_Ed + self.perceptron("embedding.paper.feed_forward", torch.cat([x_Ed, distance_Ed], dim=1))

    def groups(self, x_Ed: Tensor, group_E: np.ndarray, num_groups: int, merge_size: int) -> Tensor:
        """[G, D]: events attend to those of their own group, and K of them, or zeros, become a token."""
        if self.settings.inner_transformer:
            sees_EE = torch.from_numpy(group_E[:, None] == group_E)
            x_Ed = self.inner(x_Ed, sees_EE)
        slot_E = np.array([(group_E[:n] == group).sum() for n, group in enumerate(group_E)], np.int64)
        place_E = torch.from_numpy(group_E * merge_size + slot_E)
        x_GD = x_Ed.new_zeros(num_groups * merge_size, x_Ed.shape[1]).index_copy(0, place_E, x_Ed)
        return self.merged(x_GD.view(num_groups, merge_size * x_Ed.shape[1]))

    def merged(self, x_GD: Tensor) -> Tensor:
        """Encoders that read every event have no merge."""
        return self.linear("embedding.merge", x_GD) if "embedding.merge.weight" in self.weights else x_GD

    def inner(self, x_Ed: Tensor, sees_EE: Tensor) -> Tensor:
        name, d = "embedding.inner", x_Ed.shape[1]
        normed_Ed = self.norm(f"{name}.norm_attention", x_Ed)
        query, key, value = self.linear(f"{name}.query_key_value", normed_Ed).split(d, dim=1)
        gathered_Ed = attention(query[:, None], key[:, None], value[:, None], sees_EE)
        x_Ed = x_Ed + self.linear(f"{name}.output", gathered_Ed)
        return x_Ed + self.feed_forward(name, x_Ed)

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        return self.perceptron(f"{name}.feed_forward", self.norm(f"{name}.norm_feed_forward", x))

    def perceptron(self, name: str, x: Tensor) -> Tensor:
        """GELU between two layers."""
        x = self.linear(f"{name}.0", x)
        return self.linear(f"{name}.2", x * (1 + (x / math.sqrt(2)).erf()) / 2)

    def candidates(
        self, features: Columns, request_ts: int, last_ts: int, merge_size: int, counts_CF: Tensor | None
    ) -> Tensor:
        """[C, D]: items merged as groups of copies of themselves, with what is known of the request and the history."""
        x_Cd = self.norm("embedding.norm", self.items(features))
        if self.settings.encoding == "paper":
            at_once = np.full(len(x_Cd), request_ts)
            x_Cd = self.in_paper(x_Cd, request_ts, at_once, np.zeros(len(x_Cd), np.int64))
        if self.settings.inner_transformer:
            x_Cd = self.inner(x_Cd, torch.eye(len(x_Cd), dtype=torch.bool))
        x_CD = self.merged(torch.cat([x_Cd] * merge_size, dim=1))
        at, last = np.array([request_ts]), np.array([last_ts])
        x_CD = x_CD + self.gap("embedding.request_gap", at, last) + self.hour("embedding.request_hour", at)
        x_CD = x_CD + self.weights["embedding.request_D"]
        for name in self.schema.features_of("request", "categorical"):
            x_CD = x_CD + self.row(f"embedding.request_categories.{name}", features[name])
        for name in self.schema.features_of("request", "numeric"):
            x_CD = x_CD + self.number(f"embedding.request_numbers.{name}", features[name])
        return x_CD if counts_CF is None else x_CD + self.perceptron("interaction_token", counts_CF)

    def globals(self, user_key_1: np.ndarray) -> Tensor:
        """[M, D]: CLS tokens, then the user's own."""
        cls_MD = self.weights["embedding.cls_MD"]
        if self.settings.num_user_tokens == 0:
            return cls_MD
        return torch.cat([cls_MD, self.row("embedding.user", user_key_1).view(-1, cls_MD.shape[1])])

    def block(self, name: str, x_TD: Tensor, position_T: Tensor, sees_TT: Tensor, turned: int) -> Tensor:
        """A pre-norm layer; `turned` pairs of channels of each head are rotated by position."""
        normed_TD, width = self.norm(f"{name}.norm_attention", x_TD), x_TD.shape[1]
        key_TD, value_TD = self.linear(f"{name}.key_value", normed_TD).split(width, dim=1)
        query, key, value = (
            x.unflatten(1, (self.settings.num_heads, -1))
            for x in (self.linear(f"{name}.query", normed_TD), key_TD, value_TD)
        )
        gathered_TD = attention(rotated(query, position_T, turned), rotated(key, position_T, turned), value, sees_TT)
        x_TD = x_TD + self.linear(f"{name}.output", gathered_TD)
        return x_TD + self.feed_forward(name, x_TD)

    @property
    def turned_pairs(self) -> int:
        """A quarter of a head's pairs, rounded up."""
        return math.ceil(self.settings.width // self.settings.num_heads // 2 / 4)

    def head(self, x_CW: Tensor, item_key_C: np.ndarray) -> Tensor:
        return self.perceptron("head", x_CW) + self.row("item_bias", item_key_C)


def attention(query_THZ: Tensor, key_SHZ: Tensor, value_SHZ: Tensor, sees_TS: Tensor) -> Tensor:
    """[T, H * Z]: softmax(Q K' / sqrt(Z)) V over what is seen."""
    scores_HTS = torch.einsum("thz,shz->hts", query_THZ, key_SHZ) / math.sqrt(query_THZ.shape[-1])
    weights_HTS = scores_HTS.masked_fill(~sees_TS, -torch.inf).softmax(-1)
    return torch.einsum("hts,shz->thz", weights_HTS, value_SHZ).flatten(1)


def rotated(x_THZ: Tensor, position_T: Tensor, turned: int) -> Tensor:
    """Pair i, a channel of a head's first half and one of its second, turns by position / 10000^(i / turned)."""
    num_pairs = x_THZ.shape[-1] // 2
    speed = torch.tensor([10_000.0 ** (-i / turned) if i < turned else 0.0 for i in range(num_pairs)])
    angle_TZ = position_T[:, None].double() * speed
    cos, sin = angle_TZ.cos()[:, None].to(x_THZ.dtype), angle_TZ.sin()[:, None].to(x_THZ.dtype)
    a, b = x_THZ[..., :num_pairs], x_THZ[..., num_pairs:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _one_request(
    raw: Raw, user: Histories, request_ts: int, candidates: dict[str, np.ndarray]
) -> tuple[Tensor, Tensor]:
    settings = raw.settings
    s, K = settings.stride_groups, settings.merge_size
    W, k = settings.history_events // K, settings.query_groups
    num_events, num_candidates = len(user.event_ts_E), len(candidates["item_id"])
    g = math.ceil(num_events / K)
    history_start, query_start = s * (max(0, g - W) // s), s * (max(0, g - k) // s)

    x_Ed, in_paper = raw.events(user), settings.encoding == "paper"
    if in_paper:
        x_Ed = raw.in_paper(x_Ed, request_ts, user.event_ts_E, num_events - np.arange(num_events))
    group_E = np.arange(history_start * K, num_events) // K - history_start
    x_GD = raw.groups(x_Ed[history_start * K :], group_E, g - history_start, K)
    counts_CF = recounted(raw, user, history_start * K, request_ts, candidates)
    last_ts = int(user.event_ts_E[-1]) if num_events else int(NO_EVENT_TS)
    x_CD = raw.candidates(candidates, request_ts, last_ts, K, counts_CF)

    x_MD = raw.globals(user.user_key_B)
    own_token = len(x_GD) + len(x_MD) - 1
    if settings.queries == "learnable":
        x_MD = torch.cat([x_MD, raw.weights["variant.queries_QD"]])
    x = torch.cat([x_GD, x_MD, x_CD])
    kinds = ["group"] * len(x_GD) + ["global"] * len(x_MD) + ["candidate"] * num_candidates
    positions = torch.tensor([*range(history_start, g), *[g] * (len(x_MD) + num_candidates)])
    chosen = _chosen(settings.queries, history_start, query_start, g, k)
    pairs = [_sees(kinds, q, j) for q in range(len(x)) for j in range(len(x))]
    sees = torch.tensor(pairs, dtype=torch.bool).view(len(x), len(x))
    stays = torch.tensor(
        [kind != "group" or int(p) in chosen for kind, p in zip(kinds, positions, strict=True)], dtype=torch.bool
    )
    user_token = x[max(0, own_token) :][:1]  # none where there is no group and no global token
    for number in range(settings.num_self_layers + 1):
        if number == settings.num_self_layers:
            user_token = x[max(0, own_token) :][:1]
        turned = 0 if number == 0 or in_paper else raw.turned_pairs
        x = raw.block(f"blocks.{number}", x, positions, sees, turned)
        if number == 0:  # from here on, only the query window goes on
            x, positions, sees = x[stays], positions[stays], sees[stays][:, stays]
            own_token -= int((~stays).sum())
    left_CD = raw.norm("norm_head", x[len(x) - num_candidates :])
    if counts_CF is not None:
        left_CD = torch.cat([left_CD, counts_CF], dim=1)
    return raw.head(left_CD, candidates["item_id"]), user_token


def _chosen(queries: str, history_start: int, query_start: int, g: int, k: int) -> set[int]:
    """The groups that are queries: where windows stand, k of them, the first of each of k equal bins or the newest."""
    recent_from = {"recent": query_start, "recent_uniform": query_start + k - k // 2}.get(queries, g)
    spread = {"uniform": k, "recent_uniform": k - k // 2}.get(queries, 0)
    over = query_start + spread - history_start if queries != "uniform" else query_start + k - history_start
    bins = {history_start + math.ceil(b * over / spread) for b in range(g * spread + 1)} if spread else set()
    return {group for group in range(history_start, g) if group in bins or group >= recent_from}


def _sees(kinds: list[str], query: int, key: int) -> bool:
    """Groups come first and in order, so an earlier place is an older group."""
    if kinds[key] == "candidate":
        return query == key
    if kinds[query] == "group":
        return kinds[key] == "group" and key <= query
    return True


def recounted(
    raw: Raw, user: Histories, begin: int, request_ts: int, candidates: dict[str, np.ndarray]
) -> Tensor | None:
    """[C, F]: interaction features by looking at every event from `begin` on; None if they are off."""
    if not raw.settings.interactions:
        return None
    rows, fields = [], ("item_id", *raw.schema.features_of("item", "categorical"))
    for c in range(len(candidates["item_id"])):
        row: list[float] = []
        for field in fields:
            history, wanted = user.features[field], candidates[field][c]
            places = [i for i in range(begin, len(history)) if history[i] == wanted and wanted != 0]
            row += [math.log1p(len(places))]
            row += [math.log1p(sum(i >= len(history) - n for i in places)) for n in raw.settings.count_events]
            row += [float(bool(places))]
            row += [math.log1p(len(history) - places[-1]) if places else 0.0]
            row += [math.log1p((request_ts - user.event_ts_E[places[-1]]) / 3.6e6) if places else 0.0]
        rows.append(row)
    shape = len(rows), len(fields) * (4 + len(raw.settings.count_events))
    return torch.tensor(rows, dtype=raw.weights["embedding.request_D"].dtype).reshape(shape)
