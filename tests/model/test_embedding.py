"""Events, groups and time: what each vector may depend on."""

import numpy as np
import torch

from longer.arrays import NO_EVENT_TS
from longer.model.embedding import Gap, HourOfWeek
from longer.model.hashed_table import HashedTable
from longer.model.inputs import event_tensors
from tests.model.generate import random_histories, small_model


def test_missing_keys_have_a_row_of_their_own() -> None:
    table = HashedTable(num_rows=5, width=2)
    keys = torch.arange(1, 1000)
    rows = torch.where(keys == 0, 0, keys % 4 + 1)
    assert torch.equal(table(torch.tensor([0]))[0], table.embedding.weight[0])
    assert torch.equal(table(keys), table.embedding.weight[rows])
    assert rows.min() == 1


def test_gap_bins_are_exact_at_their_edges_and_no_event_is_its_own() -> None:
    gap = Gap(3)
    later = torch.tensor([10_000, 10_000, 10_000, 10_000])
    earlier = torch.tensor([10_000, 9_001, 8_999, int(NO_EVENT_TS)])  # 0 s, under 1 s, over 1 s, none
    vectors = gap(later, earlier)
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[1], vectors[2])
    assert torch.equal(vectors[3], gap.embedding.weight[-1])


def test_hour_zero_of_the_week_is_midnight_on_monday() -> None:
    hour = HourOfWeek(2)
    monday = 1_514_764_800_000  # 2018-01-01T00:00Z
    assert torch.equal(hour(torch.tensor([monday]))[0], hour.embedding.weight[0])
    assert torch.equal(hour(torch.tensor([monday - 1]))[0], hour.embedding.weight[167])
    assert torch.equal(hour(torch.tensor([monday + 27 * 3_600_000 + 5]))[0], hour.embedding.weight[27])


def test_an_events_vector_does_not_change_when_its_window_starts_later() -> None:
    """The gap to the event before must survive a slide: it comes from `prev_event_ts` at the row's start."""
    model = small_model()
    histories = random_histories(np.random.default_rng(3), [20])
    whole = model.embedding.events(event_tensors(histories))
    later = histories.slice_events(np.array([0]), np.array([6]), np.array([20]))
    assert torch.equal(model.embedding.events(event_tensors(later)), whole[6:])


def test_a_partial_group_equals_a_full_one_with_absent_events_left_out() -> None:
    model = small_model()
    x_Kd = torch.randn(1, 3, 4, dtype=torch.float64)
    exists = torch.tensor([[True, True, False]])
    garbage = x_Kd.clone()
    garbage[0, 2] = 1e6
    assert torch.equal(model.embedding.groups(x_Kd, exists), model.embedding.groups(garbage, exists))
    assert torch.allclose(
        model.embedding.groups(x_Kd, torch.ones(1, 3, dtype=torch.bool)), model.embedding.groups(x_Kd)
    )
