"""Gradient accumulation: a step cut into batches is the step on all of them at once."""

import copy
from dataclasses import replace

import numpy as np
import torch

from longer.arrays import Candidates, RequestBatch
from longer.model.longer import Longer
from longer.training.steps import Stepper
from longer.training_settings import TrainSettings
from tests.model.generate import TASKS, one_request_a_row, random_candidates, random_histories, small_model

LENGTHS, CANDIDATES = [0, 7, 30, 12], 3


def batch_of(model: Longer, users: list[int]) -> RequestBatch:
    """Requests of some of four users, each with three candidates and its labels."""
    rng = np.random.default_rng(0)
    histories, candidates = random_histories(rng, LENGTHS), random_candidates(rng, [CANDIDATES] * len(LENGTHS))
    labels = {task.name: rng.integers(0, 2, CANDIDATES * len(LENGTHS)).astype(np.float32) for task in TASKS}
    rows, of_users = np.array(users), (np.array(users)[:, None] * CANDIDATES + np.arange(CANDIDATES)).ravel()
    some = histories.slice_events(rows, histories.first_index_B[rows], histories.end_index_B[rows])
    features = {name: values[of_users] for name, values in candidates.features.items()}
    asked = Candidates(np.arange(len(users) + 1) * CANDIDATES, features)
    batch = one_request_a_row(model, some, np.full(len(users), 1_900_000_000_000), asked)
    return replace(batch, labels={name: values[of_users] for name, values in labels.items()})


def stepper_of(model: Longer) -> Stepper:
    return Stepper(model, TrainSettings(tasks=TASKS), torch.device("cpu"), num_workers=1)


def test_batches_one_after_the_other_have_the_gradient_of_all_at_once_and_borrowed_ones_have_none() -> None:
    whole = small_model(dtype=torch.float64).train()
    parts = copy.deepcopy(whole)
    num_candidates = CANDIDATES * len(LENGTHS)
    expected = stepper_of(whole).step([batch_of(whole, [0, 1, 2, 3])], [1.0], num_candidates)
    batches = [batch_of(parts, users) for users in ([0, 2], [1, 3], [0])]
    found = stepper_of(parts).step(batches, [1.0, 1.0, 0.0], num_candidates)
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-5, atol=0)
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9, msg=name)
