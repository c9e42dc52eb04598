"""Scores of many requests in bounded memory are those of the training forward pass, whatever the bounds."""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longer.arrays import Candidates, Float32, Histories, RequestBatch
from longer.data.batches import plan_packs
from longer.model.inputs import feature_tensors, to_tensors
from longer.model.longer import Longer
from longer.model.sweep import Asked
from longer.serving import offline
from longer.serving.offline import best_items, packs_pay, score_all, score_lists, waves
from longer.serving.packed import Packed
from longer.serving.questions import Budget, Questions
from tests.model.generate import random_candidates, random_features, random_histories, small_model

MODEL = small_model(dtype=torch.float32)
EXACT_MODEL = small_model()
SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.lists(st.integers(0, 90), min_size=1, max_size=5)
BYTES = st.sampled_from([2, 100_000, 1 << 30])


def random_questions(rng: np.random.Generator, lengths: list[int], num_requests: int) -> Questions:
    row_R = rng.integers(0, len(lengths), num_requests)
    end_R = rng.integers(0, np.array(lengths)[row_R] + 1)
    ts_R = 1_900_000_000_000 + rng.integers(0, 10**9, num_requests)
    return Questions(random_histories(rng, lengths), row_R, end_R, ts_R)


def forward(model: Longer, questions: Questions, candidates: Candidates) -> Float32:
    """[C, T] of the training forward pass, each request on a history of its own."""
    start_R = model.windows.history_start(questions.history_end_R) * model.windows.merge_size
    histories: Histories = questions.histories.slice_events(questions.row_R, start_R, questions.history_end_R)
    each = np.arange(len(questions))
    batch = RequestBatch(histories, each, questions.history_end_R, questions.request_ts_R, candidates, each)
    with torch.inference_mode():
        return model(to_tensors(batch)).numpy()


@pytest.mark.parametrize("pay", [False, True], ids=["swept", "packed"])
@given(seed=SEEDS, lengths=LENGTHS, num_requests=st.integers(1, 12), num_bytes=BYTES)
@settings(max_examples=8, deadline=None)
def test_lists_of_candidates_equal_the_forward_pass_in_either_way_within_any_budget(
    pay: bool, seed: int, lengths: list[int], num_requests: int, num_bytes: int
) -> None:
    rng = np.random.default_rng(seed)
    questions = random_questions(rng, lengths, num_requests)
    candidates = random_candidates(rng, rng.integers(0, 7, num_requests).tolist())
    with patch.object(offline, "packs_pay", lambda _: pay):
        scored = score_lists(questions, candidates, Budget(MODEL, num_bytes))
    np.testing.assert_allclose(scored, forward(MODEL, questions, candidates), rtol=1e-5, atol=1e-5)


@given(seed=SEEDS, lengths=LENGTHS, num_requests=st.integers(1, 12), num_bytes=BYTES)
@settings(max_examples=6, deadline=None)
def test_both_ways_are_one_in_float64(seed: int, lengths: list[int], num_requests: int, num_bytes: int) -> None:
    rng = np.random.default_rng(seed)
    questions = random_questions(rng, lengths, num_requests)
    candidates = random_candidates(rng, rng.integers(0, 7, num_requests).tolist())
    scored = []
    for pay in (False, True):
        with patch.object(offline, "packs_pay", lambda _, pay=pay: pay):
            scored.append(score_lists(questions, candidates, Budget(EXACT_MODEL, num_bytes)))
    np.testing.assert_allclose(*scored, rtol=1e-6, atol=1e-7)  # as float32 holds them


def test_packs_are_chosen_where_few_windows_are_encoded_again() -> None:
    """User 0 asks in one window, user 1 once in each of many, user 2 in one about more than a small budget holds."""
    windows, rng = MODEL.windows, np.random.default_rng(0)
    stride, start = windows.stride_events, 10 * windows.max_history_events
    histories = random_histories(rng, [start + 40 * stride] * 3)
    ends = [np.full(20, start), start + stride * np.arange(20), np.full(1, start)]
    sizes = [[5] * 20, [1] * 20, [20_000]]

    def pay(users: list[int], num_bytes: int) -> bool:
        row_R = np.repeat(users, [len(ends[user]) for user in users])
        end_R = np.concatenate([ends[user] for user in users])
        questions = Questions(histories, row_R, end_R, np.full(len(row_R), 2 * 10**12))
        candidates = random_candidates(rng, [n for user in users for n in sizes[user]])
        return packs_pay(Packed.of(MODEL, questions, candidates, 64).cut(Budget(MODEL, num_bytes).pack_tokens()))

    assert not pay([0, 2], 1 << 30), "on a CPU"
    with patch.object(offline, "has_kernels", lambda _: True):
        assert pay([0, 2], 4 << 20)
        assert not pay([1], 1 << 30)
        assert pay([0, 1, 2], 1 << 30), "together it pays"
        assert not pay([2], 1 << 10), "in many parts, each of which encodes the history"


@given(seed=SEEDS, most_tokens=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_packs_are_cut_until_they_fit_and_lose_no_candidate(seed: int, most_tokens: int) -> None:
    """Also of one request with many candidates, and requests with none."""
    rng = np.random.default_rng(seed)
    questions = random_questions(rng, [90, 30, 0], 12)
    candidates = random_candidates(rng, [*rng.integers(0, 20, 11), 300])
    whole = Packed.of(MODEL, questions, candidates, 5)
    packed = whole.cut(most_tokens)
    num_tail = MODEL.embedding.num_globals + 1
    assert (packed.num_candidates_P + num_tail * packed.num_requests_P < 2 * most_tokens + num_tail).all()
    assert packed.num_requests_P.max() <= 5
    assert whole.cut(10_000).packs.offsets_P1.tolist() == whole.packs.offsets_P1.tolist()
    request_C = np.repeat(np.arange(12), np.diff(candidates.offsets_R1))
    seen = np.zeros(len(request_C), int)
    for p in range(len(packed.packs)):
        picked_C, batch = packed._batch(np.array([p]))
        np.testing.assert_array_equal(questions.row_R[request_C[picked_C]], packed.row_P[p])
        of_batch = np.repeat(batch.history_end_R, np.diff(batch.candidates.offsets_R1))
        np.testing.assert_array_equal(questions.history_end_R[request_C[picked_C]], of_batch)
        seen[picked_C] += 1
    assert (seen == 1).all()


def test_a_pass_of_packs_stays_within_its_budget_or_is_one_pack() -> None:
    rng = np.random.default_rng(0)
    questions = random_questions(rng, [90, 30, 60, 0], 40)
    candidates = random_candidates(rng, rng.integers(0, 60, 40).tolist())
    packed = Packed.of(MODEL, questions, candidates, 4)
    cost_P = packed.num_events_P + packed.num_candidates_P
    assert len(packed.packs) > 10
    for most in (1, 150, 10**9):
        passes = [picked_C for picked_C, _ in packed.passes(cost_P, most)]
        assert sorted(np.concatenate(passes)) == list(range(int(candidates.offsets_R1[-1])))
        costs = [len(picked_C) for picked_C in passes]
        assert len(passes) == 1 or max(costs) <= max(most, packed.num_candidates_P.max())
    assert len(list(packed.passes(cost_P, 1))) == (packed.num_candidates_P > 0).sum()


@given(seed=SEEDS, lengths=LENGTHS, num_items=st.integers(1, 12), top_k=st.integers(1, 30), num_bytes=BYTES)
@settings(max_examples=20, deadline=None)
def test_the_best_items_are_those_of_the_whole_score_matrix(
    seed: int, lengths: list[int], num_items: int, top_k: int, num_bytes: int
) -> None:
    """Items come with their twins, so that there are ties, which go by the items' order."""
    rng, num_users = np.random.default_rng(seed), len(lengths)
    questions = random_questions(rng, lengths, num_users)
    features = random_features(rng, num_items, 12, ("item_id", "category"), ("weight",))
    features = {name: np.tile(values, 2) for name, values in features.items()}
    everyone = {name: np.tile(values, num_users) for name, values in features.items()}
    candidates = Candidates(np.arange(num_users + 1) * 2 * num_items, everyone)
    matrix_RIT = forward(MODEL, questions, candidates).reshape(num_users, 2 * num_items, 2)
    items, budget, seen = (
        feature_tensors(Candidates(np.zeros(1, np.int64), features)),
        Budget(MODEL, num_bytes),
        0,
    )
    for rows, asked in waves(questions, budget):
        numbers, outputs = best_items(asked, items, top_k, budget)
        assert numbers.shape[1] == min(top_k, 2 * num_items)
        best = -np.sort(-matrix_RIT[rows, :, 0], axis=1)[:, :top_k]
        np.testing.assert_allclose(outputs[..., 0], best, rtol=1e-5, atol=1e-5)
        kept = np.take_along_axis(matrix_RIT[rows], numbers[..., None], axis=1)
        np.testing.assert_allclose(outputs, kept, rtol=1e-5, atol=1e-5)
        assert all(len(set(row)) == len(row) for row in numbers.tolist())
        whole = np.concatenate([part for _, part in score_all(asked, items, budget)], axis=1)[..., 0]
        np.testing.assert_array_equal(numbers, np.argsort(-whole, axis=1, kind="stable")[:, :top_k])
        seen += len(rows)
    assert seen == num_users


def test_a_users_history_is_encoded_once_for_all_requests_in_time_order() -> None:
    """Events embedded: those of the window once and every later one once; besides, each request's newest group."""
    rng, embedded = np.random.default_rng(0), 0
    questions = Questions(
        random_histories(rng, [80]), np.zeros(40, np.int64), np.arange(41, 81)[::-1].copy(), np.full(40, 2 * 10**12)
    )
    original = MODEL.embedding.events

    def counting(events: object) -> torch.Tensor:
        nonlocal embedded
        out = original(events)  # type: ignore[arg-type]
        embedded += len(out)
        return out

    with patch.object(MODEL.embedding, "events", counting):
        score_lists(questions, random_candidates(rng, [3] * 40), Budget(MODEL, 1 << 30))
    first = int(MODEL.windows.history_start(41)) * MODEL.windows.merge_size
    windows = plan_packs(questions.row_R, questions.history_end_R, MODEL.windows, 40)
    partial = int((questions.history_end_R % MODEL.windows.merge_size).sum())
    assert len(windows) > 3, "the windows never moved"
    again = len(windows) * MODEL.windows.merge_size  # the partial group where one wave ends is read by the next
    assert embedded - partial <= (80 - first) + again


@pytest.mark.parametrize("num_candidates", [100, 20_000])
def test_one_users_many_candidates_never_exceed_a_block(num_candidates: int) -> None:
    rng, blocks = np.random.default_rng(0), []
    questions = Questions(random_histories(rng, [500]), np.zeros(1, np.int64), np.array([500]), np.array([2 * 10**12]))
    budget = Budget(MODEL, 1 << 20)
    original = Asked.outputs

    def counting(asked: Asked, *args: object) -> torch.Tensor:
        out = original(asked, *args)  # type: ignore[arg-type]
        blocks.append(len(out))
        return out

    candidates = random_candidates(rng, [num_candidates])
    with patch.object(Asked, "outputs", counting):
        scored = score_lists(questions, candidates, budget)
    assert sum(blocks) == len(scored) == num_candidates
    assert max(blocks) <= budget.candidates(MODEL.windows.history_groups)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.num_bytes = max([self.num_bytes, *sizes])
        return out


def test_one_request_with_very_many_candidates_costs_others_in_its_block_nothing() -> None:
    """Padded to its length, the lookups of 299 users with one candidate each took three times the budget."""
    rng, num_users, budget = np.random.default_rng(0), 300, Budget(MODEL, 16 << 20)
    questions = Questions(
        random_histories(rng, [40] * num_users),
        np.arange(num_users),
        np.full(num_users, 40),
        np.full(num_users, 2 * 10**12),
    )
    candidates = random_candidates(rng, [6_000] + [1] * (num_users - 1))
    with Largest() as largest:
        scored = score_lists(questions, candidates, budget)
    assert 1 << 18 < largest.num_bytes <= budget.num_bytes // 8
    np.testing.assert_allclose(scored, forward(MODEL, questions, candidates), rtol=1e-5, atol=1e-5)
