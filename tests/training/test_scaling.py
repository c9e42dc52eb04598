"""Gradients that are not finite change nothing and are counted; fp16 scales its loss, and learns what float32 learns."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from longer.model.longer import Longer
from longer.training.scaling import Scaling
from longer.training.steps import Stepper, dropout_seed
from longer.training_settings import TrainSettings
from tests.model.generate import TASKS, request_batch, small_model

CPU = torch.device("cpu")


def stepper_of(model: Longer, precision: str) -> Stepper:
    return Stepper(model, TrainSettings(tasks=(TASKS[0],), precision=precision), CPU, num_workers=1)  # type: ignore[arg-type]


def everything(stepper: Stepper) -> list[torch.Tensor]:
    """Copies of all weights and moments."""
    weights = list(stepper.model.parameters())
    moments = [value for p in weights for value in stepper.optimizer.state[p].values()]
    return [x.detach().clone() for x in (*weights, *moments)]


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_batch_with_an_infinite_gradient_changes_no_weight_and_no_moment(precision: str) -> None:
    stepper = stepper_of(small_model(0, torch.float32).train(), precision)
    good = request_batch(stepper.model, 1, [60, 5, 33])  # type: ignore[arg-type]
    bad = replace(
        good, labels={"click": np.where(np.arange(len(good.labels["click"])) == 3, np.inf, good.labels["click"])}
    )
    num_candidates = len(good.labels["click"])
    stepper.optimizer.scaling.scale.fill_(1.0)  # fp16's own first scale is too large for this model
    stepper.step([good], [1.0], num_candidates)
    before = everything(stepper)
    loss, norm = stepper.step([bad], [1.0], num_candidates)
    assert not norm.isfinite()
    assert not loss.isfinite()
    assert stepper.optimizer.scaling.num_skipped() == (1, 1)
    assert all(torch.equal(now, then) for now, then in zip(everything(stepper), before, strict=True))
    stepper.step([good], [1.0], num_candidates)
    assert stepper.optimizer.scaling.num_skipped() == (1, 0)
    assert not all(torch.equal(now, then) for now, then in zip(everything(stepper), before, strict=True))


def test_fp16_halves_its_scale_until_nothing_overflows_and_then_learns_what_float32_learns() -> None:
    exact = small_model(0, torch.float32).train()
    halved = copy.deepcopy(exact)
    batch, learned = request_batch(exact, 1, [60, 5, 33]), []
    for stepper in (stepper_of(exact, "float32"), stepper_of(halved, "fp16")):
        taken = [stepper.step([batch], [1.0], len(batch.labels["click"])) for _ in range(30)]
        finite = [(float(loss), float(norm)) for loss, norm in taken if norm.isfinite()]
        assert stepper.optimizer.scaling.num_skipped() == (30 - len(finite), 0)
        learned.append(finite)
    assert 3 <= len(learned[1]) < len(learned[0]) == 30
    np.testing.assert_allclose(learned[1][:3], learned[0][:3], rtol=2e-2)


def test_a_scale_that_comes_back_from_a_checkpoint_goes_on_as_the_one_that_was_saved() -> None:
    outcomes = [torch.tensor(finite) for finite in [True] * 3 + [False] + [True] * 2_100 + [False, False]]
    whole, first, second = (Scaling(CPU, is_scaled=True) for _ in range(3))
    for outcome in outcomes:
        whole.update(outcome)
    for outcome in outcomes[:1_500]:
        first.update(outcome)
    second.restore(first.state())
    for outcome in outcomes[1_500:]:
        second.update(outcome)
    assert second.state() == whole.state()
    assert whole.num_skipped() == (3, 2)
    assert float(whole.scale) == 2.0**16 / 2 * 2 / 4


def test_every_workers_random_numbers_of_a_step_are_its_own_and_the_largest_seed_overflows_nothing() -> None:
    for num_workers in (1, 2, 7):
        places = [(step, rank) for step in range(50) for rank in range(num_workers)]
        seeds = {dropout_seed(2**31 - 1, step, rank, num_workers) for step, rank in places}
        assert len(seeds) == len(places)
        torch.manual_seed(max(seeds))
