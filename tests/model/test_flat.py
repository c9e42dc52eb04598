"""The CUDA training pass against the CPU's three steps in float64; without a GPU, in Triton's interpreter where it is installed."""

import os

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longer.model import flat
from longer.model.captured import CapturedPass, stage
from longer.model.embedding import Embedding
from longer.model.flat import flat_forward, flat_outputs
from longer.model.inputs import tensors_of, to_tensors
from longer.model.layout import Sizes, flatten
from longer.model.longer import Longer
from longer.model.states import append, score
from tests.model.generate import (
    encoded,
    pool_for,
    random_candidates,
    random_histories,
    request_batch,
    slots_for,
    small_model,
)

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="the kernels need Triton: CUDA builds of PyTorch bring it")
DEVICE = "cuda" if ON_CUDA else "cpu"
pytestmark = pytest.mark.kernels
SIZES: dict[str, dict] = {
    "default": {},
    "no merging": {"merge_size": 1, "event_width": 4},
    "cross layer only": {"num_self_layers": 0, "inner_transformer": False},
    "no counts": {"interactions": False},
    "no global tokens": {"num_user_tokens": 0, "num_cls_tokens": 0},
}


def same_model(seed: int, dtype: torch.dtype, device: str, **sizes: object) -> Longer:
    """Weights that float32 holds exactly, small enough that a model of any depth stays well-conditioned."""
    model = small_model(seed, torch.float32, **sizes)
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    return model.to(device, dtype)


def outputs_and_gradients(model: Longer, outputs: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, then the gradient of a random direction of them in every parameter."""
    direction = torch.from_numpy(np.random.default_rng(1).normal(size=tuple(outputs.shape))).to(outputs)
    gradients = torch.autograd.grad((outputs * direction).sum(), list(model.parameters()), materialize_grads=True)
    return [x.detach().cpu().double() for x in (outputs, *gradients)]


@pytest.mark.parametrize("name", SIZES)
@given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(0, 60), min_size=1, max_size=3))
@example(seed=0, lengths=[0, 1, 11, 12, 13, 24, 25, 30, 31])  # nothing, a part of a group, the windows' edges
@settings(max_examples=10 if ON_CUDA else 3, deadline=None)
def test_flat_pass_equals_the_three_steps(name: str, seed: int, lengths: list[int]) -> None:
    exact, model = (
        same_model(3, torch.float64, "cpu", **SIZES[name]),
        same_model(3, torch.float32, DEVICE, **SIZES[name]),
    )
    batch = request_batch(exact, seed, lengths)
    wanted = outputs_and_gradients(exact, exact(to_tensors(batch)))
    with torch.compiler.set_stance("force_eager"):  # compiling every model costs minutes
        got = outputs_and_gradients(model, flat_forward(model, batch, DEVICE))
    names = ["outputs", *(n for n, _ in exact.named_parameters())]
    for what, ours, theirs in zip(names, got, wanted, strict=True):
        error, size = (ours - theirs).norm(), max(theirs.norm(), 1e-2 * wanted[0].numel() ** 0.5)
        assert error <= 1e-4 * size, f"{what}: {error / size:.1e}"
    assert (got[0] - wanted[0]).norm() <= 1e-5 * wanted[0].norm()


@given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(0, 60), min_size=1, max_size=3))
@settings(max_examples=10 if ON_CUDA else 3, deadline=None)
def test_a_batch_filled_up_to_fixed_sizes_gives_the_same_outputs_and_gradients(seed: int, lengths: list[int]) -> None:
    model = same_model(3, torch.float32, DEVICE)
    batch = request_batch(model, seed, lengths)
    sizes = Sizes.of(batch, model.windows)
    room = Sizes(*(size + extra for size, extra in zip(sizes, (9, 70, 37, 2, 3, 41), strict=True)))
    shapes, results = [], []
    for to in (None, room):
        laid_out = flatten(batch, model.windows, model.embedding.num_globals + 1, to)
        tensors = tensors_of(laid_out.arrays, DEVICE)
        with torch.compiler.set_stance("force_eager"):
            outputs = flat_outputs(model, laid_out, tensors)
            shapes.append(len(outputs))
            results.append(outputs_and_gradients(model, outputs[: sizes.candidates]))
    assert shapes == [sizes.candidates, room.candidates]
    for filled, plain in zip(*results, strict=True):
        assert (filled - plain).norm() <= 1e-5 * max(plain.norm(), 1.0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_runs_every_layer_and_the_groups_twice_and_changes_no_gradient(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = same_model(3, torch.float32, DEVICE, dropout=dropout, num_self_layers=1).train()
    batch, runs, gradients = request_batch(model, 0, [20]), [], []
    for module, name in ((flat, "_layer"), (Embedding, "_read_events")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, _run=original: (runs.append(_run), _run(*args))[1])
    for recompute in (False, True):
        model.set_recompute(recompute)
        torch.manual_seed(0)
        runs.clear()
        with torch.compiler.set_stance("force_eager"):
            gradients.append(outputs_and_gradients(model, flat_forward(model, batch, DEVICE)))
        assert len(runs) == (2 + 1) * (1 + recompute)
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not ON_CUDA, reason="CUDA graphs need CUDA")
def test_a_captured_pass_that_recomputes_gives_the_gradients_of_one_that_does_not() -> None:
    model = same_model(3, torch.float32, DEVICE)
    batch, one, gradients = request_batch(model, 0, [60, 5, 33]), torch.ones((), device=DEVICE), []
    for recompute in (False, True):
        model.set_recompute(recompute)
        with torch.compiler.set_stance("force_eager"):
            staged = stage(batch, model, Sizes.of(batch, model.windows))
            captured = CapturedPass(model, lambda outputs, labels, exists: (outputs[:, 0] ** 2 * exists).sum(), staged)
            captured.forward(staged)
            captured.backward(one)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not ON_CUDA, reason="CUDA graphs need CUDA")
def test_a_captured_pass_gives_each_batch_its_own_gradients() -> None:
    model = same_model(3, torch.float32, DEVICE)
    batches = [request_batch(model, seed, [60, 5, 33]) for seed in range(3)]
    room = Sizes(*map(max, zip(*(Sizes.of(batch, model.windows) for batch in batches), strict=True)))

    def loss(outputs: torch.Tensor, labels: dict[str, torch.Tensor], exists: torch.Tensor) -> torch.Tensor:
        return ((outputs[:, 0] - labels["click"]) ** 2 * exists).sum()

    with torch.compiler.set_stance("force_eager"):
        captured = CapturedPass(model, loss, stage(batches[0], model, room))
        for batch in batches:
            value = float(captured.forward(stage(batch, model, room)))
            captured.backward(torch.ones((), device=DEVICE))
            ours = [p.grad.clone() for p in model.parameters()]
            outputs = flat_forward(model, batch, DEVICE)
            wanted = ((outputs[:, 0] - torch.from_numpy(batch.labels["click"]).to(DEVICE)) ** 2).sum()
            theirs = torch.autograd.grad(wanted, list(model.parameters()), materialize_grads=True)
            assert abs(value - float(wanted)) <= 1e-5 * abs(float(wanted))
            for a, b in zip(ours, theirs, strict=True):
                assert (a - b).norm() <= 1e-4 * max(float(b.norm()), 1.0)


@pytest.mark.skipif(not ON_CUDA, reason="CUDA graphs need CUDA")
def test_a_step_that_captures_its_graph_as_after_a_resume_drops_what_it_drops_in_an_undisturbed_run() -> None:
    model = same_model(3, torch.float32, DEVICE, dropout=0.5).train()
    batch, losses, gradients = request_batch(model, 0, [60, 5, 33]), [], []
    with torch.compiler.set_stance("force_eager"):
        staged = stage(batch, model, Sizes.of(batch, model.windows))

        def captured_now() -> CapturedPass:
            return CapturedPass(model, lambda outputs, labels, exists: (outputs[:, 0] ** 2 * exists).sum(), staged)

        torch.manual_seed(1)
        undisturbed = captured_now()
        for seed, resumed in ((7, False), (7, True), (7, False), (8, False)):
            torch.manual_seed(seed)
            taken = captured_now() if resumed else undisturbed
            losses.append(float(taken.forward(staged)))
            taken.backward(torch.ones((), device=DEVICE))
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert abs(losses[3] - losses[0]) > 1e-3 * abs(losses[0]), "another seed drops others"
    for first, *others in zip(*gradients[:3], strict=True):
        for other in others:
            assert (other - first).norm() <= 1e-4 * max(float(first.norm()), 1.0)


@pytest.mark.skipif(not ON_CUDA, reason="the three steps use the kernels on CUDA only")
@given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4))
@settings(max_examples=10, deadline=None)
def test_states_on_cuda_score_as_the_cpu_does(seed: int, lengths: list[int]) -> None:
    exact, model, rng = (
        same_model(3, torch.float64, "cpu"),
        same_model(3, torch.float32, "cuda"),
        np.random.default_rng(seed),
    )
    histories = random_histories(rng, lengths)
    candidates = random_candidates(rng, rng.integers(0, 40, len(lengths)).tolist())
    request_ts = np.full(len(lengths), 2_000_000_000_000)
    rows, ends = np.arange(len(lengths)), histories.end_index_B
    with torch.compiler.set_stance("force_eager"):
        pool, exact_pool = pool_for(model, 2 * len(histories)), pool_for(exact, len(histories))
        states = encoded(model, pool, histories.slice_events(rows, np.zeros_like(ends), ends // 2))
        states = append(model, pool, states, histories.slice_events(rows, ends // 2, ends), slots_for(pool, ends))
        ours = score(model, pool, states, request_ts, candidates)
    np.testing.assert_allclose(
        ours,
        score(exact, exact_pool, encoded(exact, exact_pool, histories), request_ts, candidates),
        rtol=1e-5,
        atol=1e-5,
    )
