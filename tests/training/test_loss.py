"""The loss of a step against numbers worked out by hand."""

import math

import pytest
import torch

from longer.training.steps import loss_sum
from longer.training_settings import TaskSettings

TASKS = (
    TaskSettings(name="click", weight=0.5),
    TaskSettings(name="minutes", kind="regression", weight=3.0),
)
LABELS = {"click": torch.tensor([1.0, 0.0]), "minutes": torch.tensor([4.0, -1.0])}
OUTPUTS = [[0.0, 2.5], [math.log(3), -3.0]]
"""Clicks by halves and by three quarters: ln 2 and ln 4. Minutes off by -1.5 and -2: squares 2.25 and 4."""


def test_a_loss_is_weighted_cross_entropy_and_squared_error() -> None:
    output_CT = torch.tensor(OUTPUTS, requires_grad=True)
    loss = loss_sum(output_CT, LABELS, TASKS)
    loss.backward()
    assert float(loss) == pytest.approx(0.5 * 3 * math.log(2) + 3 * 6.25, rel=1e-6)
    # weight * (probability - label), and weight * 2 * error
    assert output_CT.grad is not None
    torch.testing.assert_close(output_CT.grad, torch.tensor([[0.5 * -0.5, 3 * -3.0], [0.5 * 0.75, 3 * -4.0]]))


def test_a_tasks_gradient_grows_with_its_own_weight_alone() -> None:
    gradients = []
    for weight in (0.5, 2.0):
        output_CT = torch.tensor(OUTPUTS, requires_grad=True)
        loss_sum(output_CT, LABELS, (TASKS[0].model_copy(update={"weight": weight}), TASKS[1])).backward()
        assert output_CT.grad is not None
        gradients.append(output_CT.grad)
    torch.testing.assert_close(gradients[1], gradients[0] * torch.tensor([4.0, 1.0]))


def test_what_only_fills_a_batch_up_has_no_loss() -> None:
    output_CT = torch.tensor([*OUTPUTS, [50.0, 50.0]], requires_grad=True)
    labels = {name: torch.cat([label, torch.zeros(1)]) for name, label in LABELS.items()}
    loss = loss_sum(output_CT, labels, TASKS, torch.tensor([True, True, False]))
    loss.backward()
    assert float(loss) == pytest.approx(float(loss_sum(torch.tensor(OUTPUTS), LABELS, TASKS)))
    assert output_CT.grad is not None
    assert output_CT.grad[2].tolist() == [0, 0]
