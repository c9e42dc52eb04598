"""Updates of large tables: the rows that were read, each once, and nothing else. On CUDA by our kernels, elsewhere by torch."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.model.captured import stage
from longer.model.layout import Sizes
from longer.model.longer import Longer
from longer.training.optimizer import Optimizer
from longer.training.steps import Stepper
from longer.training.table_gradients import combine
from longer.training_settings import TaskSettings, TrainSettings
from tests.model.generate import request_batch, small_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("uncompiled")
LONG = TrainSettings(clip_norm=1e9, tasks=(TaskSettings(name="click"),))


@pytest.fixture(scope="module")
def uncompiled() -> Iterator[None]:
    """Compiling every model costs a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@given(
    seed=st.integers(0, 2**32 - 1), num_reads=st.integers(1, 700), num_rows=st.integers(1, 90), width=st.integers(1, 40)
)
@settings(max_examples=12 if DEVICE.type == "cuda" else 60, deadline=None)
def test_a_row_read_many_times_has_the_sum_of_its_gradients_once(
    seed: int, num_reads: int, num_rows: int, width: int
) -> None:
    rng = np.random.default_rng(seed)
    rows_E = torch.from_numpy(rng.integers(0, num_rows, num_reads)).to(DEVICE)
    gradient_Ed = torch.from_numpy(rng.normal(size=(num_reads, width)).astype(np.float32)).to(DEVICE)
    cut = num_reads // 3
    reads = [(rows_E[:cut], gradient_Ed[:cut]), (rows_E[cut:], gradient_Ed[cut:])]
    combined, again = combine(reads), combine(reads)
    num = int(combined.num_rows)
    rows_U = combined.rows_U[:num].long()
    assert rows_U.tolist() == sorted(set(rows_E.tolist()))
    dense = torch.zeros(num_rows, width, device=DEVICE, dtype=torch.float64).index_add_(0, rows_E, gradient_Ed.double())
    torch.testing.assert_close(combined.gradient_Ud[:num].double(), dense[rows_U], rtol=1e-5, atol=1e-5)
    assert not combined.gradient_Ud[num:].any()
    assert torch.equal(combined.gradient_Ud, again.gradient_Ud)


def gradients_of_a_step(model: Longer, seed: int) -> None:
    """Reads and gradients of a random loss over some rows of each large table, a few of them with a gradient of zero."""
    generator = torch.Generator().manual_seed(seed)
    loss = model.embedding.cls_MD.sum()
    for table in model.large_tables().values():
        keys = torch.randint(0, 7, (9,), generator=generator).to(DEVICE)
        read = table(keys)
        direction = torch.randn(read.shape, generator=generator).to(DEVICE)
        direction[:3] = 0
        loss = loss + (read * direction).sum() + read.square().sum() * 0.1
    loss.backward()


def test_rows_that_nobody_read_keep_weights_and_moments_and_the_others_follow_adam() -> None:
    model = small_model(0, torch.float32).to(DEVICE)
    optimizer = Optimizer(model, LONG)
    twin = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in model.large_tables()}
    reference = torch.optim.SparseAdam(list(twin.values()), lr=LONG.embedding_learning_rate)
    for seed in range(6):
        before = {name: model.get_parameter(name).detach().clone() for name in twin}
        optimizer.zero_grad()
        gradients_of_a_step(model, seed)
        for name, table in model.large_tables().items():
            assert table.reads
            rows_E, gradient_Ed = (torch.cat(parts) for parts in zip(*table.reads, strict=True))
            read = torch.zeros(len(twin[name]), dtype=torch.bool, device=DEVICE)
            read[rows_E] = True
            twin[name].grad = torch.sparse_coo_tensor(
                rows_E[None], gradient_Ed, twin[name].shape, check_invariants=True
            )
        optimizer.step()
        reference.step()
        for name, table in model.large_tables().items():
            weight = model.get_parameter(name)
            assert weight.grad is None
            torch.testing.assert_close(weight, twin[name], rtol=1e-4, atol=1e-5)
            unread = torch.ones(len(weight), dtype=torch.bool, device=DEVICE)
            unread[torch.cat([rows for rows, _ in table.reads or ()])] = False
            assert unread.any()
            assert torch.equal(weight[unread], before[name][unread])


def test_a_step_without_a_loss_changes_no_table() -> None:
    model = small_model(0, torch.float32).to(DEVICE)
    stepper = Stepper(model, LONG, DEVICE, 1)
    batch = request_batch(model, 1, [60, 5, 33])
    stepper.step([stepper.staged(batch)], [1.0], len(batch.labels["click"]))
    before = {name: model.get_parameter(name).detach().clone() for name in model.large_tables()}
    stepper.step([stepper.staged(batch)], [0.0], 10)
    for name, weight in before.items():
        assert torch.equal(weight, model.get_parameter(name))


def test_noted_gradients_are_those_of_the_whole_table() -> None:
    model, plain = (small_model(0, torch.float32).to(DEVICE) for _ in range(2))
    stepper = Stepper(model, LONG, DEVICE, 1)
    batch = request_batch(model, 1, [60, 5, 33])
    stepper.step([batch], [1.0], len(batch.labels["click"]))
    other = Stepper(plain, LONG, DEVICE, 1)
    for table in plain.large_tables().values():
        table.reads = None
    other.optimizer.tables.clear()
    with torch.no_grad():
        other.optimizer.zero_grad()
    other.step([batch], [1.0], len(batch.labels["click"]))
    for name, table in model.large_tables().items():
        assert table.reads
        gradient = plain.get_parameter(name).grad
        assert gradient is not None
        combined = combine(table.reads)
        summed = torch.zeros_like(gradient).index_add_(0, combined.rows_U.long(), combined.gradient_Ud)
        torch.testing.assert_close(summed, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need CUDA")
def test_captured_steps_learn_what_launched_ones_do() -> None:
    outcomes = []
    for is_captured in (False, True):
        model = small_model(0, torch.float32).to(DEVICE)
        stepper = Stepper(model, LONG, DEVICE, 1)
        losses = []
        for seed, lengths in enumerate([[60, 5, 33], [4, 9], [60, 60, 60, 60], [1, 30], [60, 5, 33]]):
            batch = request_batch(model, seed, lengths)
            staged = stepper.staged(batch) if is_captured else batch
            loss, norm = stepper.step([staged], [1.0], len(batch.labels["click"]))
            losses.append((float(loss), float(norm)))
        outcomes.append((losses, model))
    np.testing.assert_allclose(outcomes[0][0], outcomes[1][0], rtol=1e-4)
    for one, other in zip(*(model.parameters() for _, model in outcomes), strict=True):
        # Adam divides by what it has seen: where gradients are all but nothing, their order of summing shows
        torch.testing.assert_close(one, other, rtol=1e-3, atol=5e-4)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="batches are staged for CUDA only")
def test_a_staged_batch_holds_its_arrays_in_pinned_memory() -> None:
    model = small_model(0, torch.float32).to(DEVICE)
    batch = request_batch(model, 0, [60, 5])
    staged = stage(batch, model, Sizes.of(batch, model.windows))
    assert all(buffer.is_pinned() for buffer in staged.buffers.values())
    assert sum(map(len, staged.buffers.values())) == sum(map(len, staged.flat.arrays.values()))
