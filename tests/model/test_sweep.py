"""Requests scored on the way through their users' histories get the scores of a full recomputation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.arrays import Candidates
from longer.data.batches import plan_packs
from longer.model.inputs import event_tensors, feature_tensors
from longer.model.longer import Longer
from longer.model.sweep import Asked, Sweep
from tests.model.generate import random_candidates, random_histories, small_model
from tests.model.reference import reference_outputs, reference_vectors

MODELS = {
    "default": small_model(),
    "paper's stride 1": small_model(2, stride_groups=1),
    "cross layer only": small_model(3, num_self_layers=0, inner_transformer=False),
}


def outputs_in_parts(asked: Asked, candidates: Candidates, bounds: list[int]) -> np.ndarray:
    """The outputs of all candidates, asked for in parts that begin and end anywhere."""
    offsets, features = candidates.offsets_R1, feature_tensors(candidates)
    parts = []
    for begin, end in zip([0, *bounds], [*bounds, int(offsets[-1])], strict=True):
        if begin == end:
            continue
        first, last = np.searchsorted(offsets, [begin, end - 1], side="right") - 1
        inside = np.clip(offsets[first : last + 2], begin, end) - begin
        part = {name: values[begin:end] for name, values in features.items()}
        parts.append(asked.outputs(int(first), int(last) + 1, inside, part).numpy())
    return np.concatenate(parts) if parts else np.zeros((0, 2))


def test_events_cut_on_a_device_are_those_cut_on_the_host() -> None:
    rng = np.random.default_rng(0)
    for lengths in ([3, 0, 50, 7], [0, 0], [1]):
        histories = random_histories(rng, lengths)
        row_N = rng.integers(0, len(lengths), 20)
        end_N = rng.integers(0, np.array(lengths)[row_N] + 1)
        start_N = rng.integers(0, end_N + 1)
        expected = event_tensors(histories.slice_events(row_N, start_N, end_N))
        where = (torch.from_numpy(x) for x in (row_N, start_N, end_N))
        found = event_tensors(histories).slice_events(*where, int((end_N - start_N).sum()))  # type: ignore[arg-type]
        for name, values in vars(expected).items():
            torch.testing.assert_close(getattr(found, name), values, rtol=0, atol=0)


def swept(model: Longer, rng: np.random.Generator, lengths: list[int], num_requests: int) -> None:
    """Sweeps random requests of the users in time order and compares every output with the reference."""
    histories = random_histories(rng, lengths)
    row_R = np.sort(rng.integers(0, len(lengths), num_requests))
    end_R = rng.integers(0, np.array(lengths)[row_R] + 1)
    ts_R = 1_900_000_000_000 + rng.integers(0, 10**9, num_requests)
    packs = plan_packs(row_R, end_R, model.windows, num_requests)
    oldest_P = packs.order_R[packs.offsets_P1[:-1]]
    wave_P = np.arange(len(packs)) - np.searchsorted(row_R[oldest_P], row_R[oldest_P])
    num_waves_B = np.bincount(row_R[oldest_P], minlength=len(lengths))
    order_B = np.argsort(-num_waves_B, kind="stable")
    every = histories.slice_events(order_B, np.zeros(len(lengths), np.int64), histories.end_index_B[order_B])
    sweep = Sweep(model, every)
    for wave in range(max(num_waves_B)):
        present = order_B[: int((num_waves_B > wave).sum())]
        chosen = packs.take(np.array([np.flatnonzero((row_R[oldest_P] == b) & (wave_P == wave))[0] for b in present]))
        asked_R, sizes = chosen.order_R, np.diff(chosen.offsets_P1)
        sweep.advance(end_R[chosen.order_R[chosen.offsets_P1[1:] - 1]])
        asked = sweep.ask(np.repeat(np.arange(len(present)), sizes), end_R[asked_R], ts_R[asked_R])
        candidates = random_candidates(rng, rng.integers(0, 5, len(asked_R)).tolist())
        bounds = np.sort(rng.integers(0, candidates.offsets_R1[-1] + 1, 2)).tolist()
        rows = row_R[asked_R]
        cut = histories.slice_events(rows, np.zeros(len(rows), np.int64), end_R[asked_R])
        expected = reference_outputs(model, cut, ts_R[asked_R], candidates)
        np.testing.assert_allclose(outputs_in_parts(asked, candidates, bounds), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    num_requests=st.integers(1, 12),
)
@settings(max_examples=25, deadline=None)
def test_requests_on_the_way_equal_the_dense_reference_across_window_moves(
    name: str, seed: int, lengths: list[int], num_requests: int
) -> None:
    swept(MODELS[name], np.random.default_rng(seed), lengths, num_requests)


def test_a_user_vector_is_that_of_the_dense_reference_and_tells_histories_apart() -> None:
    model = MODELS["default"]
    histories = random_histories(np.random.default_rng(3), [80, 80])
    stepwise, at_once, before = Sweep(model, histories), Sweep(model, histories), Sweep(model, histories)
    for end in (5, 40, 41, 80):
        stepwise.advance(np.array([end, end]))
    at_once.advance(np.array([80, 80]))
    before.advance(np.array([79, 79]))

    def vectors(sweep: Sweep, end: int) -> torch.Tensor:
        return sweep.ask(np.arange(2), np.array([end, end]), np.zeros(2, np.int64)).user_vectors_RD

    torch.testing.assert_close(vectors(stepwise, 80), vectors(at_once, 80), rtol=1e-10, atol=1e-10)
    expected = reference_vectors(model, histories)
    np.testing.assert_allclose(vectors(at_once, 80).numpy(), expected, rtol=1e-10, atol=1e-10)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3, "users are not told apart"
    assert not torch.allclose(vectors(at_once, 80), vectors(before, 79), atol=1e-3)
