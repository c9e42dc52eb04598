"""One promise, many paths: dense reference == training forward == encode + score == any chain of appends + score."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longer.arrays import Histories, RequestBatch
from longer.model.inputs import to_tensors
from longer.model.longer import Longer
from longer.model.states import UserState, append, encode, rows_for, score
from tests.model.generate import (
    encoded,
    one_request_a_row,
    pool_for,
    random_candidates,
    random_histories,
    slots_for,
    small_model,
)
from tests.model.reference import reference_outputs, reference_tensors

MODELS = {
    "default": small_model(),
    "no merging": small_model(1, merge_size=1, event_width=4, history_events=24),
    "paper's stride 1": small_model(2, stride_groups=1),
    "cross layer only": small_model(3, num_self_layers=0, inner_transformer=False),
    "no global tokens": small_model(14, num_user_tokens=0, num_cls_tokens=0),
    "whole window is queries": small_model(4, query_groups=8, history_events=24, stride_groups=4),
}
VARIANTS = {
    "uniform queries": small_model(5, queries="uniform"),
    "uniform queries, many": small_model(6, queries="uniform", query_groups=6, stride_groups=2, num_self_layers=3),
    "recent and uniform": small_model(7, queries="recent_uniform"),
    "learnable queries": small_model(8, queries="learnable"),
    "paper's encoding": small_model(9, encoding="paper"),
    "paper's encoding, no merging": small_model(10, encoding="paper", merge_size=1, event_width=4, queries="uniform"),
    "several user tokens, no CLS": small_model(11, num_user_tokens=3, num_cls_tokens=0),
    "no user tokens, learnable queries": small_model(15, num_user_tokens=0, queries="learnable"),
    "no interactions, no inner": small_model(12, interactions=False, inner_transformer=False),
    "no interactions, learnable": small_model(13, interactions=False, queries="learnable", num_self_layers=0),
}
LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=4)
exactly = {"rtol": 1e-10, "atol": 1e-10}


def ask(rng: np.random.Generator, histories: Histories) -> tuple[np.ndarray, list[int]]:
    """Request times strictly after each user's last event, and how many candidates to score."""
    ends = histories.offsets_B1[1:]
    has_events = np.diff(histories.offsets_B1) > 0
    last = np.where(has_events, np.append(histories.event_ts_E, 0)[np.maximum(ends - 1, 0)], 1_600_000_000_000)
    return last + rng.integers(1, 10**9, len(histories)), rng.integers(0, 5, len(histories)).tolist()


EDGES = [0, 1, 11, 12, 13, 24, 25, 30, 31]
"""No event, one, and both sides of a full group, the query window, the history window and its move."""


@pytest.mark.parametrize("name", MODELS)
@given(seed=st.integers(0, 2**32 - 1), lengths=LENGTHS)
@example(seed=0, lengths=EDGES)
@settings(max_examples=25, deadline=None)
def test_forward_and_cached_scores_equal_the_dense_reference(name: str, seed: int, lengths: list[int]) -> None:
    model, rng = MODELS[name], np.random.default_rng(seed)
    histories = random_histories(rng, lengths)
    request_ts, counts = ask(rng, histories)
    candidates = random_candidates(rng, counts)
    expected = reference_outputs(model, histories, request_ts, candidates)
    forward = model(to_tensors(one_request_a_row(model, histories, request_ts, candidates))).detach().numpy()
    pool = pool_for(model, len(histories))
    cached = score(model, pool, encoded(model, pool, histories), request_ts, candidates)
    np.testing.assert_allclose(forward, expected, **exactly)
    np.testing.assert_allclose(cached, expected, **exactly)


def test_gradients_equal_those_of_the_dense_reference() -> None:
    """Every weight's: a path may be right forward and detach what it shares."""
    model, rng = MODELS["default"], np.random.default_rng(4)
    histories = random_histories(rng, EDGES)
    request_ts = ask(rng, histories)[0]
    candidates = random_candidates(rng, [3] * len(EDGES))
    slope = torch.from_numpy(rng.normal(size=(3 * len(EDGES), 2)))
    found = []
    for outputs in (
        model(to_tensors(one_request_a_row(model, histories, request_ts, candidates))),
        reference_tensors(model, histories, request_ts, candidates),
    ):
        model.zero_grad(set_to_none=True)
        (outputs * slope).sum().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    torch.testing.assert_close(*found, **exactly)


@pytest.mark.parametrize("name", VARIANTS)
@given(seed=st.integers(0, 2**32 - 1), lengths=LENGTHS)
@example(seed=0, lengths=EDGES)
@settings(max_examples=20, deadline=None)
def test_every_switch_equals_the_dense_reference(name: str, seed: int, lengths: list[int]) -> None:
    model, rng = VARIANTS[name], np.random.default_rng(seed)
    histories = random_histories(rng, lengths)
    request_ts, counts = ask(rng, histories)
    candidates = random_candidates(rng, counts)
    expected = reference_outputs(model, histories, request_ts, candidates)
    forward = model(to_tensors(one_request_a_row(model, histories, request_ts, candidates))).detach().numpy()
    np.testing.assert_allclose(forward, expected, **exactly)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_switch_gives_every_weight_a_gradient_even_without_events(name: str) -> None:
    model, rng = VARIANTS[name], np.random.default_rng(1)
    histories = random_histories(rng, [0, 0])
    batch = one_request_a_row(model, histories, np.full(2, 2_000_000_000_000), random_candidates(rng, [2, 1]))
    model.zero_grad(set_to_none=True)
    model(to_tensors(batch)).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", MODELS)
@given(seed=st.integers(0, 2**32 - 1), lengths=LENGTHS, num_appends=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_appended_states_equal_encoded_ones_across_window_moves(
    name: str, seed: int, lengths: list[int], num_appends: int
) -> None:
    model, rng = MODELS[name], np.random.default_rng(seed)
    histories = random_histories(rng, lengths)
    request_ts, counts = ask(rng, histories)
    candidates = random_candidates(rng, counts)
    rows, total = np.arange(len(lengths)), np.array(lengths)
    cuts = np.sort(rng.integers(0, total[:, None] + 1, (len(lengths), num_appends)), axis=1)
    pool = pool_for(model, 3 * len(lengths))
    states = encoded(model, pool, histories.slice_events(rows, np.zeros_like(total), cuts[:, 0]))
    for begin, end in zip(cuts.T, [*cuts.T[1:], total], strict=True):
        needed = rows_for(pool.layout, end)
        slots = []
        for b, stays in enumerate(rng.random(len(states)) < 0.7):
            to_come = np.arange(end[b], total[b] + 1)
            largest = np.argmax(rows_for(pool.layout, to_come))  # so that some of the appends to come are in place
            in_place = stays and needed[b] <= states[b].slot.size
            slots.append(states[b].slot if in_place else slots_for(pool, to_come[[largest]])[0])
        old, states = states, append(model, pool, states, histories.slice_events(rows, begin, end), slots)
        for before, slot in zip(old, slots, strict=True):
            if before.slot is not slot:
                pool.slots.free(before.slot)
    fresh = encoded(model, pool, histories)
    np.testing.assert_allclose(
        score(model, pool, states, request_ts, candidates), score(model, pool, fresh, request_ts, candidates), **exactly
    )
    for appended, fresh_one in zip(states, fresh, strict=True):
        assert numbers_of(appended) == numbers_of(fresh_one)


def numbers_of(state: UserState) -> tuple[int, ...]:
    return state.first_index, state.num_events, state.last_event_ts, state.query_first


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(0, 60), num_new=st.integers(0, 30))
@settings(max_examples=25, deadline=None)
def test_a_state_appended_to_in_another_slot_stays_as_it_was(seed: int, length: int, num_new: int) -> None:
    model, rng = MODELS["default"], np.random.default_rng(seed)
    histories, row = random_histories(rng, [length + num_new]), np.array([0])
    candidates, request_ts = random_candidates(rng, [3]), np.array([2_000_000_000_000])
    pool = pool_for(model, 2)
    states = encoded(model, pool, histories.slice_events(row, row, row + length))
    before = score(model, pool, states, request_ts, candidates)
    new = histories.slice_events(row, row + length, row + length + num_new)
    append(model, pool, states, new, slots_for(pool, row + length + num_new))
    np.testing.assert_array_equal(score(model, pool, states, request_ts, candidates), before)


def test_a_slot_that_is_too_small_is_refused_instead_of_writing_over_the_next_one() -> None:
    model, rng, row = MODELS["default"], np.random.default_rng(0), np.array([0])
    pool, histories = pool_for(model, 2), random_histories(rng, [29])
    (small,) = slots_for(pool, row + 1)
    before = pool.words_NI.clone()
    with pytest.raises(ValueError, match="does not fit into its slot"):
        encode(model, pool, histories, [small])
    assert torch.equal(pool.words_NI, before)
    states = encode(model, pool, histories.slice_events(row, row, row + 1), [small])
    before = pool.words_NI.clone()
    with pytest.raises(ValueError, match="does not fit into its slot"):
        append(model, pool, states, histories.slice_events(row, row + 1, row + 29), [small])
    assert torch.equal(pool.words_NI, before)


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_requests_that_share_an_encode_equal_requests_alone(seed: int, length: int) -> None:
    """Training packs requests of one user whose windows start alike; each must see its own history only, not its neighbours'."""
    model, rng = MODELS["default"], np.random.default_rng(seed)
    histories = random_histories(rng, [length])
    ends = np.array([e for e in range(length + 1) if _same_windows(model, e, length)])
    ends = np.sort(rng.choice(ends, size=min(3, len(ends)), replace=False))
    candidates = random_candidates(rng, [2] * len(ends))
    request_ts = np.full(len(ends), 2_000_000_000_000)
    start = model.windows.history_start(length) * model.windows.merge_size
    shared = histories.slice_events(np.array([0]), np.array([start]), ends[-1:])
    row = np.zeros(len(ends), np.int64)
    together = model(to_tensors(RequestBatch(shared, row, ends, request_ts, candidates, row))).detach().numpy()
    rows = np.zeros(len(ends), np.int64)
    apart = reference_outputs(model, histories.slice_events(rows, rows, ends), request_ts, candidates)
    np.testing.assert_allclose(together, apart, **exactly)


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(0, 60), name=st.sampled_from(list(VARIANTS)))
@settings(max_examples=40, deadline=None)
def test_switches_do_not_depend_on_who_shares_the_batch(seed: int, length: int, name: str) -> None:
    model, rng = VARIANTS[name], np.random.default_rng(seed)
    histories = random_histories(rng, [length])
    ends = np.array([e for e in range(length + 1) if _same_windows(model, e, length)])
    candidates = random_candidates(rng, [2] * len(ends))
    request_ts, row = np.full(len(ends), 2_000_000_000_000), np.zeros(len(ends), np.int64)
    start = model.windows.history_start(length) * model.windows.merge_size
    shared = histories.slice_events(np.array([0]), np.array([start]), ends[-1:])
    together = model(to_tensors(RequestBatch(shared, row, ends, request_ts, candidates, row))).detach().numpy()
    apart = reference_outputs(model, histories.slice_events(row, row, ends), request_ts, candidates)
    np.testing.assert_allclose(together, apart, **exactly)


def test_recomputed_activations_give_the_same_gradients() -> None:
    rng = np.random.default_rng(9)
    model = VARIANTS["recent and uniform"]
    histories = random_histories(rng, [0, 5, 40])
    batch = to_tensors(one_request_a_row(model, histories, ask(rng, histories)[0], random_candidates(rng, [3, 3, 3])))
    gradients = []
    for recompute in (False, True):
        model.set_recompute(recompute)
        model.zero_grad(set_to_none=True)
        model(batch).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


def _same_windows(model: Longer, end: int, length: int) -> bool:
    windows = model.windows
    return windows.query_start(end) == windows.query_start(length) and windows.history_start(
        end
    ) == windows.history_start(length)


def test_states_that_compaction_moves_score_the_same() -> None:
    rng, model = np.random.default_rng(9), MODELS["default"]
    pool = pool_for(model, 2)
    slots = []
    while (slot := pool.slots.allocate(1)) is not None:
        slots.append(slot)
    kept = slots[:: len(slots) // 4][:4]
    histories = random_histories(rng, [2, 2, 1, 0])  # as slots for no full group hold
    candidates, request_ts = random_candidates(rng, [3] * 4), np.full(4, 2_000_000_000_000)
    states = encode(model, pool, histories, kept)
    before, places = score(model, pool, states, request_ts, candidates), [slot.start for slot in kept]
    for slot in slots:
        if slot not in kept:
            pool.slots.free(slot)
    while pool.slots.allocate(pool.layout.largest_rows) is not None:
        pass
    assert [slot.start for slot in kept] != places
    np.testing.assert_array_equal(score(model, pool, states, request_ts, candidates), before)


def test_float32_states_are_within_1e5_of_forward() -> None:
    rng = np.random.default_rng(5)
    model = small_model(dtype=torch.float32)
    histories = random_histories(rng, [0, 1, 7, 24, 29, 55])
    request_ts, _ = ask(rng, histories)
    candidates = random_candidates(rng, [4] * len(histories))
    forward = model(to_tensors(one_request_a_row(model, histories, request_ts, candidates))).detach().numpy()
    rows, ends = np.arange(len(histories)), histories.end_index_B
    pool = pool_for(model, 2 * len(histories))
    states = encoded(model, pool, histories.slice_events(rows, np.zeros_like(ends), ends // 2))
    states = append(model, pool, states, histories.slice_events(rows, ends // 2, ends), slots_for(pool, ends))
    np.testing.assert_allclose(score(model, pool, states, request_ts, candidates), forward, rtol=1e-5, atol=1e-5)


def test_bf16_scores_stay_within_their_stated_tolerance() -> None:
    """Autocast to bfloat16 keeps 8 bits: probabilities of these deliberately large weights move by at most 0.05."""
    rng = np.random.default_rng(8)
    model = small_model(dtype=torch.float32)
    histories = random_histories(rng, [0, 5, 24, 55])
    request_ts, _ = ask(rng, histories)
    batch = to_tensors(one_request_a_row(model, histories, request_ts, random_candidates(rng, [8] * 4)))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(batch)[:, 0].float().sigmoid()
    full = model(batch)[:, 0].sigmoid()
    assert 0 < (low - full).abs().max() <= 0.05


def test_a_billion_events_lose_no_precision_in_position() -> None:
    """Rotation by absolute index must give the same scores however old the user is: only differences count."""
    rng = np.random.default_rng(6)
    model = small_model(dtype=torch.float32)
    histories = random_histories(rng, [30])
    stride = model.windows.stride_events
    old = 10**9 // stride * stride
    aged = Histories(**{**histories.__dict__, "first_index_B": histories.first_index_B + old})
    window_start = model.windows.history_start(30 + old) * model.windows.merge_size
    pool = pool_for(model, 2)
    young = encoded(model, pool, histories.slice_events(np.array([0]), np.array([window_start - old]), np.array([30])))
    candidates, request_ts = random_candidates(rng, [5]), np.array([2_000_000_000_000])
    aged_scores = score(model, pool, encoded(model, pool, aged), request_ts, candidates)
    np.testing.assert_allclose(aged_scores, score(model, pool, young, request_ts, candidates), rtol=1e-5, atol=1e-5)


def test_candidates_do_not_see_each_other() -> None:
    rng = np.random.default_rng(7)
    model = MODELS["default"]
    pool = pool_for(model, 1)
    states = encoded(model, pool, random_histories(rng, [40]))
    candidates, request_ts = random_candidates(rng, [6]), np.array([2_000_000_000_000])
    together = score(model, pool, states, request_ts, candidates)
    for c in range(6):
        alone = type(candidates)(np.array([0, 1]), {name: v[c : c + 1] for name, v in candidates.features.items()})
        np.testing.assert_allclose(score(model, pool, states, request_ts, alone)[0], together[c], **exactly)
