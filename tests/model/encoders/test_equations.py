"""Every encoder against its paper's equations, written out one candidate at a time over one user's events.

L events of the user, D width, H heads, Z head width.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longer.arrays import RequestBatch
from longer.model.encoders import bucket
from longer.model.encoders.distance import Bias, half_octave
from longer.model.encoders.factory import make_model, upstream_settings
from longer.model.encoders.hstu import HstuEncoder
from longer.model.encoders.pooling import DinEncoder
from longer.model.encoders.ranker import EncoderRanker
from longer.model.encoders.search import ExactSearchUnit, SimEncoder, TwinEncoder
from longer.model.encoders.transformer import TransformerEncoder, UserTowerEncoder
from longer.model.inputs import BatchTensors, event_tensors, to_tensors
from longer.model_settings import ModelSettings
from tests.model.generate import SCHEMA, SIZES, TASKS, one_request_a_row, random_candidates, random_histories

LENGTHS = [0, 1, 2, 7, 23, 24, 29, 60]
ENCODERS: list[dict[str, Any]] = [
    {"kind": "none"},
    {"kind": "sum_pooling"},
    {"kind": "din"},
    {"kind": "din", "recent_events": 5},
    {"kind": "sim", "top_events": 3, "short_events": 2},
    {"kind": "sim", "search": "soft", "top_events": 3, "short_events": 2},
    {"kind": "twin", "top_events": 3},
    {"kind": "transformer"},
    {"kind": "hstu"},
    {"kind": "user_tower"},
    {"kind": "user_embedding"},
]
exactly = {"rtol": 1e-9, "atol": 1e-9}


def small_ranker(encoder: dict[str, Any], seed: int = 0, **sizes: object) -> EncoderRanker:
    torch.manual_seed(seed)
    sizes = {**SIZES, "merge_size": 1, "event_width": 8, "encoder": encoder, **sizes}
    model = make_model(ModelSettings(**sizes), SCHEMA, TASKS)
    assert isinstance(model, EncoderRanker)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.double().eval()


def name_of(encoder: dict[str, Any]) -> str:
    return "-".join(str(value) for value in encoder.values())


def entered(model: EncoderRanker, batch: BatchTensors) -> Tensor:
    """[C, D]: the candidates as encoders are given them, with what is known of their requests."""
    request_C = batch.request_of_candidate_C
    request_RD = model.embedding.requests(
        batch.request_ts_R, batch.histories.last_ts_R(batch.row_R, batch.history_end_R)
    )
    features_CF = model.batch_interactions(batch, request_C, request_RD.dtype)
    return model.enter(request_RD, request_C, features_CF, batch.candidates)


class OneUser:
    """What one user's candidates read: events of the window as vectors, candidates as vectors, and the raw features of both."""

    def __init__(self, model: EncoderRanker, batch: BatchTensors, request: int, recent: int | None = None) -> None:
        source = batch.source
        end = int(source.history_end_R[request])
        begin = int(model.windows.history_start(end)) if recent is None else max(0, end - recent)
        begin = max(begin, int(model.windows.history_start(end)))
        row = np.array([source.row_R[request]])
        events = source.histories.slice_events(row, np.array([begin]), np.array([end]))
        self.events = event_tensors(events)
        own = slice(*source.candidates.offsets_R1[request : request + 2])
        self.candidates = {name: torch.from_numpy(x[own]) for name, x in source.candidates.features.items()}
        self.x_LD = model.embedding.groups(model.embedding.events(self.events)[:, None])
        self.v_CD = entered(model, batch)[own]
        self.request_ts = int(source.request_ts_R[request])
        self.ts = self.events.event_ts_E


@pytest.fixture(scope="module")
def asked() -> RequestBatch:
    rng = np.random.default_rng(3)
    histories = random_histories(rng, LENGTHS)
    candidates = random_candidates(rng, [3] * len(LENGTHS))
    return one_request_a_row(
        small_ranker({"kind": "none"}), histories, np.full(len(LENGTHS), 2_000_000_000_000), candidates
    )


def check(encoder: dict[str, Any], asked: RequestBatch, equation: Any) -> None:
    """`equation(model, user, c)` is the vector that the encoder must give candidate c."""
    model = small_ranker(encoder)
    batch = to_tensors(asked)
    assert model.encoder is not None
    found_CD = model.encode(model.encoder, batch, entered(model, batch))
    users = [OneUser(model, batch, r, encoder.get("recent_events")) for r in range(asked.num_requests)]
    expected = [equation(model, user, c) for user in users for c in range(len(user.v_CD))]
    torch.testing.assert_close(found_CD, torch.stack(expected), **exactly)


def test_sum_pooling_is_the_sum_of_the_window(asked: RequestBatch) -> None:
    check({"kind": "sum_pooling"}, asked, lambda model, user, c: user.x_LD.sum(0) / math.sqrt(24))


@pytest.mark.parametrize("recent", [None, 5])
def test_din_weights_each_event_by_its_activation_unit_without_a_softmax(
    recent: int | None, asked: RequestBatch
) -> None:
    def equation(model: EncoderRanker, user: OneUser, c: int) -> Tensor:
        unit, v = model.encoder, user.v_CD[c]
        assert isinstance(unit, DinEncoder)
        total = torch.zeros_like(v)
        for e in user.x_LD:
            total = total + unit.weight(unit.activation(unit.hidden(torch.cat([v, e, v - e, v * e])))) * e
        return total / math.sqrt(recent or 24)  # of the events that it reads

    check({"kind": "din", "recent_events": recent}, asked, equation)


def attention(unit: ExactSearchUnit, user: OneUser, v: Tensor, found: list[int], num_heads: int) -> Tensor:
    """SIM's exact search unit: multi-head softmax attention to [event; distance in time]."""
    if not found:
        return torch.zeros_like(v)
    timed = [torch.cat([user.x_LD[i], unit.gap(torch.tensor(user.request_ts), user.ts[i])]) for i in found]
    heads = []
    for h in range(num_heads):
        part = slice(h * len(v) // num_heads, (h + 1) * len(v) // num_heads)
        query = unit.query(v)[part]
        scores = torch.stack([query @ unit.key(z)[part] for z in timed]) / math.sqrt(len(query))
        weights = scores.softmax(0)
        heads.append(sum(w * unit.value(z)[part] for w, z in zip(weights, timed, strict=True)))
    return torch.cat(heads)


def test_sim_hard_attends_to_the_newest_events_of_the_candidates_category(asked: RequestBatch) -> None:
    def equation(model: EncoderRanker, user: OneUser, c: int) -> Tensor:
        assert isinstance(model.encoder, SimEncoder)
        wanted = int(user.candidates["category"][c])
        same = [i for i, key in enumerate(user.events.features["category"].tolist()) if key == wanted and wanted]
        found = (model.encoder.long, same[-3:]), (model.encoder.short, [*range(len(user.x_LD))][-2:])
        return torch.cat(
            [attention(unit, user, user.v_CD[c], slots, model.settings.num_heads) for unit, slots in found]
        )

    check({"kind": "sim", "top_events": 3, "short_events": 2}, asked, equation)


def test_sim_soft_searches_by_inner_product_and_keeps_the_weighted_sum(asked: RequestBatch) -> None:
    def equation(model: EncoderRanker, user: OneUser, c: int) -> Tensor:
        unit, v = model.encoder, user.v_CD[c]
        assert isinstance(unit, SimEncoder)
        relevance = [(unit.search_event(e) @ unit.search_candidate(v)).item() / math.sqrt(len(v)) for e in user.x_LD]
        everything = sum((r * e for r, e in zip(relevance, user.x_LD, strict=True)), torch.zeros_like(v))
        best = sorted(range(len(relevance)), key=lambda i: -relevance[i])[:3]
        found = (unit.long, best), (unit.short, [*range(len(user.x_LD))][-2:])
        attended = [attention(each, user, v, slots, model.settings.num_heads) for each, slots in found]
        return torch.cat([everything / math.sqrt(24), *attended])

    check({"kind": "sim", "search": "soft", "top_events": 3, "short_events": 2}, asked, equation)


def test_twin_searches_and_attends_by_the_same_scores(asked: RequestBatch) -> None:
    def equation(model: EncoderRanker, user: OneUser, c: int) -> Tensor:
        unit, own, v = model.encoder, model.embedding, user.v_CD[c]
        assert isinstance(unit, TwinEncoder)
        features, num_heads = user.events.features, model.settings.num_heads
        item_LD = own.candidates(features)  # K_h: what an event shares with a candidate of the same item
        sides = [own.event_categories[name](features[name]) for name in ("action", "shop")]
        sides += [own.event_number("price", features["price"])]
        sides += [own.gap(user.ts, user.events.previous_ts_E()), own.hour(user.ts)]
        scores = torch.zeros(num_heads, len(user.x_LD), dtype=torch.float64)
        for h in range(num_heads):
            part = slice(h * len(v) // num_heads, (h + 1) * len(v) // num_heads)
            for i in range(len(user.x_LD)):
                inherent = unit.query(v)[part] @ unit.key(item_LD[i])[part] / math.sqrt(part.stop - part.start)
                cross = sum(b * w(x[i])[0] for b, w, x in zip(unit.beta_HJ[h], unit.cross, sides, strict=True))
                age = half_octave(torch.tensor((user.request_ts - int(user.ts[i])) // 1000))
                scores[h, i] = inherent + cross + unit.beta_of_age_H[h] * unit.by_age[int(age)]
        best = scores.mean(0).topk(min(3, scores.shape[1])).indices
        if not len(best):
            return torch.zeros_like(v)
        values = unit.value(user.x_LD[best]).unflatten(-1, (num_heads, -1))
        return torch.cat([scores[h, best].softmax(0) @ values[:, h] for h in range(num_heads)])

    check({"kind": "twin", "top_events": 3}, asked, equation)


def causal_block(block: Any, x_TD: Tensor) -> Tensor:
    position = torch.arange(len(x_TD))
    query, (key, value) = block.queries(x_TD, position), block.keys_values(x_TD, position)
    scores = torch.einsum("qhz,khz->hqk", query, key) / math.sqrt(query.shape[-1])
    hidden = position > position[:, None]
    gathered = torch.einsum("hqk,khz->qhz", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)
    return block.finish(x_TD, gathered.flatten(1))


def test_transformer_is_a_causal_transformer_with_the_candidate_at_the_end(asked: RequestBatch) -> None:
    def equation(model: EncoderRanker, user: OneUser, c: int) -> Tensor:
        assert isinstance(model.encoder, TransformerEncoder)
        x_TD = torch.cat([user.x_LD, user.v_CD[c : c + 1]])
        for block in model.encoder.layers:
            x_TD = causal_block(block, x_TD)
        return model.encoder.norm(x_TD[-1])

    check({"kind": "transformer"}, asked, equation)


def test_user_tower_multiplies_the_newest_event_with_the_candidate(asked: RequestBatch) -> None:
    def equation(model: EncoderRanker, user: OneUser, c: int) -> Tensor:
        tower = model.encoder
        assert isinstance(tower, UserTowerEncoder)
        x_LD = user.x_LD
        for block in tower.layers:
            x_LD = causal_block(block, x_LD)
        u = tower.norm(x_LD[-1]) if len(x_LD) else torch.zeros_like(user.v_CD[c])
        return u * tower.candidate(user.v_CD[c])

    check({"kind": "user_tower"}, asked, equation)


def test_hstu_is_pointwise_attention_gated_by_u(asked: RequestBatch) -> None:
    def equation(model: EncoderRanker, user: OneUser, c: int) -> Tensor:
        encoder = model.encoder
        assert isinstance(encoder, HstuEncoder)
        x_TD = torch.cat([user.x_LD, user.v_CD[c : c + 1]])
        times = [*user.ts.tolist(), user.request_ts]
        for layer in encoder.layers:
            u, v, q, k = (
                F.silu(layer.f1(layer.norm_input(x_TD))).unflatten(-1, (4, model.settings.num_heads, -1)).unbind(1)
            )
            rows = []
            for i in range(len(x_TD)):
                total = torch.zeros_like(v[0])
                for j in range(i + 1):
                    distance = half_octave(torch.tensor(i - j))
                    time = half_octave(torch.tensor((times[i] - times[j]) // 1000))
                    bias = layer.by_distance[int(distance)] + layer.by_time[int(time)]
                    total = total + F.silu((q[i] * k[j]).sum(-1) + bias)[:, None] * v[j] / 24
                rows.append(total.flatten())
            x_TD = x_TD + layer.f2(layer.norm_gathered(torch.stack(rows)) * u.flatten(1))
        return encoder.norm(x_TD[-1])

    check({"kind": "hstu"}, asked, equation)


def test_hstu_in_blocks_that_are_computed_again_equals_it_at_once(asked: RequestBatch) -> None:
    """What events behind the first block ask may be lost, and its gradient. Layers keep the size that they were made with."""
    model, batch = small_ranker({"kind": "hstu"}), to_tensors(asked)
    at_once = model(batch), gradients(model, asked)
    assert isinstance(model.encoder, HstuEncoder)
    for layer in model.encoder.layers:
        assert layer.block_events > max(LENGTHS)
        layer.block_events = 5
    torch.testing.assert_close((model(batch), gradients(model, asked)), at_once, **exactly)


def gradients(model: EncoderRanker, asked: RequestBatch) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(to_tensors(asked)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_counted_gradients_of_a_bias_table_are_those_of_a_look_up() -> None:
    classes = torch.randint(0, 64, (3, 50), dtype=torch.uint8)
    table = torch.randn(64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Bias.apply, (table, classes))


def test_distances_fall_into_half_octaves() -> None:
    assert half_octave(torch.tensor([-5, 0, 1, 2, 3, 4, 1 << 40])).tolist() == [0, 0, 1, 3, 4, 5, 63]


def test_user_embedding_is_the_towers_vector_and_never_learns(asked: RequestBatch) -> None:
    model, batch = small_ranker({"kind": "user_embedding"}), to_tensors(asked)
    tower = make_model(upstream_settings(model.settings), SCHEMA, TASKS).double().eval()
    assert isinstance(tower, EncoderRanker)
    assert isinstance(tower.encoder, UserTowerEncoder)
    model.upstream.load_state_dict(tower.state_dict())
    products = tower.encode(tower.encoder, batch, entered(tower, batch))
    of_candidates = tower.encoder.candidate(entered(tower, batch))
    assert model.encoder is not None
    read = model.encode(model.encoder, batch, entered(model, batch))
    torch.testing.assert_close(read * of_candidates, products, **exactly)
    model(batch).sum().backward()
    assert all(parameter.grad is None for parameter in model.upstream.parameters())
    trained = {id(p) for p in (*model.dense_parameters(), *model.embedding_parameters())}
    assert not trained & {id(p) for p in model.upstream.parameters()}


def test_a_frozen_user_embedding_is_the_same_in_every_training_step(asked: RequestBatch) -> None:
    """Its tower would drop out as the model does, and what is told to be frozen be noise."""
    model, batch = small_ranker({"kind": "user_embedding"}, dropout=0.5), to_tensors(asked)
    assert model.encoder is not None
    served = model.encode(model.encoder, batch, entered(model, batch))
    for mode in (True, False, True):
        read = model.train(mode).encode(model.encoder, batch, entered(model, batch))
        torch.testing.assert_close(read, served, **exactly)
        assert model.training == model.encoder.training == mode
    made = make_model(model.settings, SCHEMA, TASKS)  # as training makes it, whose models begin in train mode
    assert isinstance(made, EncoderRanker)
    assert made.training
    assert not any(module.training for module in made.upstream.modules())


@pytest.mark.parametrize("encoder", [e for e in ENCODERS if e["kind"] != "user_embedding"], ids=name_of)
def test_dropout_is_accepted_by_those_encoders_that_drop_out(encoder: dict[str, Any], asked: RequestBatch) -> None:
    """Of the others it would be a setting that does nothing. The frozen user embedding tells what its tower was trained with."""
    model = small_ranker(encoder)
    model = make_model(model.settings.model_copy(update={"dropout": 0.5}), SCHEMA, TASKS).train()
    once, again = model(to_tensors(asked)), model(to_tensors(asked))
    assert is_accepted({**model.settings.model_dump(), "dropout": 0.5}) != torch.equal(once, again)


def is_accepted(model: dict[str, Any]) -> bool:
    try:
        return bool(ModelSettings(**model))
    except ValueError:
        return False


@pytest.mark.parametrize("encoder", ENCODERS, ids=name_of)
def test_every_trained_weight_has_a_gradient_even_where_nobody_has_a_history(encoder: dict[str, Any]) -> None:
    """Data-parallel training waits for the gradient of every weight in every step."""
    model, rng = small_ranker(encoder), np.random.default_rng(0)
    for lengths in ([0, 0], [0, 9]):
        candidates = random_candidates(rng, [2, 2])
        batch = one_request_a_row(model, random_histories(rng, lengths), np.full(2, 2_000_000_000_000), candidates)
        model.zero_grad(set_to_none=True)
        outputs = model(to_tensors(batch))
        assert torch.isfinite(outputs).all()
        outputs.sum().backward()
        trained = (*model.dense_parameters(), *model.embedding_parameters())
        assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("most_cells", [1 << 26, 500])
@pytest.mark.parametrize("encoder", ENCODERS, ids=name_of)
def test_buckets_as_cuda_has_them_give_what_those_of_similar_lengths_do(
    encoder: dict[str, Any], most_cells: int, asked: RequestBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, on_cpu = small_ranker(encoder), to_tensors(asked), bucket._parts
    expected = model(batch)
    monkeypatch.setattr(bucket, "_MAX_CELLS", {"cuda": most_cells, "cpu": 1 << 26})
    monkeypatch.setattr(bucket, "_parts", lambda *sizes: on_cpu(*sizes[:-1], torch.device("cuda")))
    torch.testing.assert_close(model(batch), expected, **exactly)


@pytest.mark.parametrize("encoder", ENCODERS, ids=name_of)
def test_recomputed_activations_give_the_same_gradients(encoder: dict[str, Any], asked: RequestBatch) -> None:
    model = small_ranker(encoder)
    kept = gradients(model, asked)
    model.set_recompute(True)
    torch.testing.assert_close(gradients(model, asked), kept, **exactly)


@pytest.mark.parametrize("encoder", ENCODERS, ids=name_of)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(0, 60), num_candidates=st.sampled_from([0, 1, 150]))
@example(seed=0, length=0, num_candidates=0)
@settings(max_examples=10, deadline=None)
def test_requests_that_share_a_history_equal_requests_alone(
    encoder: dict[str, Any], seed: int, length: int, num_candidates: int
) -> None:
    model, rng = small_ranker(encoder, stride_groups=2), np.random.default_rng(seed)
    histories = random_histories(rng, [length])
    windows = model.windows
    alike = [e for e in range(length + 1) if windows.history_start(e) == windows.history_start(length)]
    ends = np.sort(rng.choice(alike, size=min(3, len(alike)), replace=False))
    counts = rng.integers(0, num_candidates + 1, len(ends))  # some more than a tile
    candidates = random_candidates(rng, counts.tolist())
    start, row = np.array([windows.history_start(length)]), np.zeros(len(ends), np.int64)
    ts = np.full(len(ends), 2_000_000_000_000)
    shared = histories.slice_events(row[:1], start, ends[-1:])
    together = model(to_tensors(RequestBatch(shared, row, ends, ts, candidates, row)))
    apart = histories.slice_events(row, np.full(len(ends), start[0]), ends)
    rows = np.arange(len(ends))
    alone = model(to_tensors(RequestBatch(apart, rows, ends, ts, candidates, rows)))
    torch.testing.assert_close(together, alone, **exactly)
    assert torch.isfinite(together).all()


@pytest.mark.parametrize("encoder", ENCODERS, ids=name_of)
def test_bf16_runs_and_stays_near(encoder: dict[str, Any], asked: RequestBatch) -> None:
    model = small_ranker(encoder).float()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(to_tensors(asked))[:, 0].float().sigmoid()
    full = model(to_tensors(asked))[:, 0].sigmoid()
    assert (low - full).abs().max() <= 0.1
