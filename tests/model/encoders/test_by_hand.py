"""What every encoder's model returns, worked out in NumPy from raw weights by its paper's equations.

L events of one user, C candidates, D width, H heads, Z head width.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from longer.arrays import Histories
from longer.encoder_settings import Din
from longer.model.encoders.pooling import DinEncoder, SumPoolingEncoder
from longer.model.encoders.ranker import EncoderRanker, SequenceEncoder
from longer.model.encoders.search import ExactSearchUnit
from longer.model.inputs import to_tensors
from longer.model_settings import ModelSettings
from tests.model.encoders.test_equations import small_ranker
from tests.model.generate import one_request_a_row, random_candidates, random_histories
from tests.model.reference import Raw, recounted

NUM_EVENTS, WINDOW, NUM_HEADS, HEAD_WIDTH = 9, 24, 2, 4
REQUEST_TS = 1_600_000_000_000
Array = np.ndarray


class User(NamedTuple):
    """What there is to read: the events' vectors, the candidate's, and the events' raw features."""

    raw: Raw
    weights: dict[str, Array]
    x_LD: Array
    v_D: Array
    history: Histories
    category: int


def numbers(x: torch.Tensor) -> Array:
    return x.detach().numpy()


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def layer_norm(user: User, name: str, x: Array, eps: float = 1e-5) -> Array:
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return scaled * user.weights[f"{name}.weight"] + user.weights[f"{name}.bias"]


def linear(user: User, name: str, x: Array) -> Array:
    return x @ user.weights[f"{name}.weight"].T + user.weights.get(f"{name}.bias", 0)


def half_octave(distance: int) -> int:
    return int(1 + 2 * math.log2(distance)) if distance > 0 else 0


def sum_pooling(user: User) -> Array:
    return user.x_LD.sum(0) / math.sqrt(WINDOW)


def din(user: User, recent: int = WINDOW) -> Array:
    """Eq. 3 of arXiv 1706.06978: the sum of a(e, v) e, where a is an MLP with PReLU; no softmax."""
    total, v = np.zeros_like(user.v_D), user.v_D
    for e in user.x_LD[-recent:]:
        hidden = linear(user, "encoder.hidden", np.concatenate([v, e, v - e, v * e]))
        hidden = np.where(hidden > 0, hidden, user.weights["encoder.activation.weight"] * hidden)
        total += linear(user, "encoder.weight", hidden) * e
    return total / math.sqrt(recent)


def exact_search(user: User, name: str, found: list[int]) -> Array:
    """Eqs. 4 and 5 of arXiv 2006.05639: softmax over inner products of the candidate and [event; distance in time]."""
    gaps = user.raw.gap(f"{name}.gap", np.full(len(found), REQUEST_TS), user.history.event_ts_E[found])
    z = np.concatenate([user.x_LD[found], numbers(gaps)], axis=1)
    query, key, value = (
        linear(user, f"{name}.{part}", x) for part, x in (("query", user.v_D), ("key", z), ("value", z))
    )
    heads = [slice(h * HEAD_WIDTH, (h + 1) * HEAD_WIDTH) for h in range(NUM_HEADS)]
    return np.concatenate([softmax(key[:, h] @ query[h] / math.sqrt(HEAD_WIDTH)) @ value[:, h] for h in heads])


def sim_hard(user: User) -> Array:
    same = [n for n, category in enumerate(user.history.features["category"]) if category == user.category]
    newest = [NUM_EVENTS - 2, NUM_EVENTS - 1]
    return np.concatenate([exact_search(user, "encoder.long", same[-3:]), exact_search(user, "encoder.short", newest)])


def sim_soft(user: User) -> Array:
    """Eq. 1: r_i = (W_b e_i)(W_a e_a), and its weighted sum U_r."""
    asks = linear(user, "encoder.search_candidate", user.v_D)
    relevance_L = linear(user, "encoder.search_event", user.x_LD) @ asks / math.sqrt(len(asks))
    best, newest = np.argsort(-relevance_L)[:3].tolist(), [NUM_EVENTS - 2, NUM_EVENTS - 1]
    parts = [exact_search(user, "encoder.long", best), exact_search(user, "encoder.short", newest)]
    return np.concatenate([relevance_L @ user.x_LD / math.sqrt(WINDOW), *parts])


def twin(user: User) -> Array:
    """Eqs. 5 and 7 of arXiv 2302.02352: (K_h W_h)(q W_q)' / sqrt(d) + (K_c W_c) b finds events, and weights them."""
    raw, history, w = user.raw, user.history, user.weights
    items = raw.norm("embedding.norm", raw.items(history.features))
    item_LD = numbers(raw.inner(items, torch.eye(NUM_EVENTS, dtype=torch.bool)))
    previous_ts = np.append(history.prev_event_ts_B, history.event_ts_E)[:-1]
    sides = [numbers(x) for x in raw.event_sides(history.features, history.event_ts_E, previous_ts)]
    side_LJ = np.stack([x @ w[f"encoder.cross.{j}.weight"][0] for j, x in enumerate(sides)], axis=1)
    ages = [half_octave((REQUEST_TS - int(ts)) // 1000) for ts in history.event_ts_E]
    query, key, value = (
        linear(user, f"encoder.{part}", x).reshape(-1, NUM_HEADS, HEAD_WIDTH)
        for part, x in (("query", user.v_D), ("key", item_LD), ("value", user.x_LD))
    )
    scores_HL = np.einsum("hz,lhz->hl", query[0], key) / math.sqrt(HEAD_WIDTH) + w["encoder.beta_HJ"] @ side_LJ.T
    scores_HL += w["encoder.beta_of_age_H"][:, None] * w["encoder.by_age"][ages]
    best = np.argsort(-scores_HL.mean(0))[:3]
    return np.einsum("hl,lhz->hz", softmax(scores_HL[:, best]), value[best]).ravel()


def causal_layers(user: User, x_TD: Array, turned_of_first: int) -> Array:
    x, sees = torch.from_numpy(x_TD), torch.ones(len(x_TD), len(x_TD), dtype=torch.bool).tril()
    for layer in range(2):
        turned = turned_of_first if layer == 0 else 1  # a quarter of a head's two pairs, rounded up
        x = user.raw.block(f"encoder.layers.blocks.{layer}", x, torch.arange(len(x)), sees, turned)
    return layer_norm(user, "encoder.norm", numbers(x))


def transformer(user: User) -> Array:
    """The candidate is the last token. The first layer searches at any distance and turns nothing."""
    return causal_layers(user, np.concatenate([user.x_LD, user.v_D[None]]), turned_of_first=0)[-1]


def user_tower(user: User) -> Array:
    return causal_layers(user, user.x_LD, turned_of_first=1)[-1] * linear(user, "encoder.candidate", user.v_D)


def user_embedding(user: User) -> Array:
    """The tower's own embeddings and layers, none of which are the model's."""
    prefix = "encoder.upstream."
    upstream = Raw.__new__(Raw)
    upstream.settings, upstream.schema = user.raw.settings, user.raw.schema
    upstream.weights = {name.removeprefix(prefix): w for name, w in user.raw.weights.items() if name.startswith(prefix)}
    x_LD = numbers(upstream.groups(upstream.events(user.history), np.arange(NUM_EVENTS), NUM_EVENTS, 1))
    weights = {name: numbers(w) for name, w in upstream.weights.items()}
    return causal_layers(user._replace(raw=upstream, weights=weights), x_LD, turned_of_first=1)[-1]


def hstu(user: User) -> Array:
    """Eqs. 1 to 3 of arXiv 2402.17152: y = f2(norm(silu(Q K' + rab) V / n) * U); the candidate is the last token."""
    x_TD, w = np.concatenate([user.x_LD, user.v_D[None]]), user.weights
    times = [*user.history.event_ts_E.tolist(), REQUEST_TS]
    for name in ("encoder.layers.0", "encoder.layers.1"):
        split = silu(linear(user, f"{name}.f1", layer_norm(user, f"{name}.norm_input", x_TD)))
        u, v, q, k = split.reshape(len(x_TD), 4, NUM_HEADS, HEAD_WIDTH).transpose(1, 0, 2, 3)
        gathered = np.zeros_like(v)
        for i in range(len(x_TD)):
            for j in range(i + 1):
                rab = w[f"{name}.by_distance"][half_octave(i - j)]
                rab = rab + w[f"{name}.by_time"][half_octave((times[i] - times[j]) // 1000)]
                gathered[i] += silu((q[i] * k[j]).sum(-1) + rab)[:, None] * v[j] / WINDOW
        normed = layer_norm(user, f"{name}.norm_gathered", gathered.reshape(x_TD.shape), eps=1e-6)
        x_TD = x_TD + linear(user, f"{name}.f2", normed * u.reshape(x_TD.shape))
    return layer_norm(user, "encoder.norm", x_TD[-1])


CASES: dict[str, tuple[dict[str, Any], Callable[[User], Array] | None]] = {
    "none": ({"kind": "none"}, None),
    "sum pooling": ({"kind": "sum_pooling"}, sum_pooling),
    "DIN": ({"kind": "din"}, din),
    "DIN on the recent": ({"kind": "din", "recent_events": 5}, lambda user: din(user, 5)),
    "SIM, hard": ({"kind": "sim", "top_events": 3, "short_events": 2}, sim_hard),
    "SIM, soft": ({"kind": "sim", "search": "soft", "top_events": 3, "short_events": 2}, sim_soft),
    "TWIN": ({"kind": "twin", "top_events": 3}, twin),
    "Transformer": ({"kind": "transformer"}, transformer),
    "HSTU": ({"kind": "hstu"}, hstu),
    "user tower": ({"kind": "user_tower"}, user_tower),
    "frozen user embedding": ({"kind": "user_embedding"}, user_embedding),
}


@pytest.mark.parametrize("interactions", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_what_the_equations_give(name: str, interactions: bool) -> None:
    """The heads read [x, r, x * r]: x is the candidate with the user's globals, r what the encoder read for it."""
    encoder, equation = CASES[name]
    model, rng = small_ranker(encoder, interactions=interactions), np.random.default_rng(6)
    history, candidates = random_histories(rng, [NUM_EVENTS]), random_candidates(rng, [2])
    history.features["category"][:] = rng.choice(candidates.features["category"], NUM_EVENTS)
    found = model(to_tensors(one_request_a_row(model, history, np.array([REQUEST_TS]), candidates)))
    expected = worked_out(model, history, candidates.features, equation)
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-9, atol=1e-9)


def worked_out(
    model: EncoderRanker, history: Histories, asked: dict[str, Array], equation: Callable[[User], Array] | None
) -> Array:
    raw = Raw(model)
    counts_CF = recounted(raw, history, 0, REQUEST_TS, asked)
    v_CD = raw.candidates(asked, REQUEST_TS, int(history.event_ts_E[-1]), 1, counts_CF)
    x_CD = v_CD + raw.globals(history.user_key_B).sum(0)
    parts = [raw.norm("norm_head", x_CD)]
    if counts_CF is not None:
        parts.append(counts_CF)
    if equation is not None:
        x_LD = numbers(raw.groups(raw.events(history), np.arange(NUM_EVENTS), NUM_EVENTS, 1))
        weights = {name: numbers(weight) for name, weight in raw.weights.items()}
        users = [
            User(raw, weights, x_LD, v_D, history, category)
            for v_D, category in zip(numbers(v_CD), asked["category"], strict=True)
        ]
        read_CD = raw.linear("read", torch.from_numpy(np.stack([equation(user) for user in users])))
        parts += [read_CD, x_CD * read_CD]
    return numbers(raw.head(torch.cat(parts, dim=1), asked["item_id"]))


FOUR_EVENTS = ModelSettings(
    encoder={"kind": "din"}, history_events=4, merge_size=1, event_width=2, num_heads=1, query_groups=4, stride_groups=2
)
TWO_EVENTS: Any = SimpleNamespace(
    x_BLD=torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]),
    x_NLD=torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]),
    x_NAD=torch.tensor([[[-1.0, 1.0]]]),
    row_N=torch.tensor([0]),
    begin_NA=torch.tensor([[0]]),
    end_NA=torch.tensor([[2]]),
    seen_NAL=torch.ones(1, 1, 2, dtype=torch.bool),
    event_ts_BL=torch.tensor([[0, 0]]),
    request_ts_NA=torch.tensor([[0]]),
)
"""Events (1, 0) and (0, 2) of a window of four, and a candidate (-1, 1)."""


def read(encoder: SequenceEncoder) -> list[float]:
    return encoder(TWO_EVENTS, None).flatten().tolist()


def test_sum_pooling_of_two_events_in_numbers() -> None:
    assert read(SumPoolingEncoder(FOUR_EVENTS)) == [0.5, 1.0]


def test_din_of_two_events_in_numbers() -> None:
    """A hidden unit v * e is -1 and 2, PReLU makes the first -0.25, and 0.5 is added: weights are 0.25 and 2.5."""
    encoder = DinEncoder(FOUR_EVENTS, Din(hidden_width=1))
    with torch.no_grad():
        encoder.hidden.weight.copy_(torch.tensor([[0.0, 0, 0, 0, 0, 0, 1, 1]]))
        encoder.hidden.bias.zero_()
        encoder.weight.weight.fill_(1)
        encoder.weight.bias.fill_(0.5)
    assert read(encoder) == [0.125, 2.5]


def test_sims_attention_to_two_events_in_numbers() -> None:
    """Scores are -ln 2 and 2 ln 2, whose softmax is 1/9 and 8/9; the distance in time adds (3, 6) to each value."""
    unit = ExactSearchUnit(2, 1, torch.ones(2))
    with torch.no_grad():
        unit.query.weight.copy_(torch.eye(2) * math.sqrt(2) * math.log(2))
        unit.key.weight.copy_(torch.eye(2, 4))
        unit.value.weight.copy_(torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]))
        unit.gap.embedding.weight.copy_(torch.tensor([3.0, 6.0]).expand(65, 2))
    slots, found = torch.tensor([[[0, 1]]]), torch.ones(1, 1, 2, dtype=torch.bool)
    assert unit(TWO_EVENTS, slots, found).flatten().tolist() == pytest.approx([3 + 1 / 9, 6 + 16 / 9])
