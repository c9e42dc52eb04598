"""The visibility rule of the contract, token by token."""

import torch

from longer.model.visibility import CANDIDATE, GLOBAL, GROUP, visible


def test_no_token_sees_what_it_must_not() -> None:
    kinds = torch.tensor([GROUP, GROUP, GROUP, GLOBAL, GLOBAL, CANDIDATE, CANDIDATE])
    index = torch.tensor([7, 8, 9, 0, 0, 0, 1])
    mask = visible(kinds[:, None], index[:, None], kinds, index)
    expected = [
        [1, 0, 0, 0, 0, 0, 0],  # group 7
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],  # a global: all groups, all globals
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],  # a candidate: those and itself, never another candidate
        [1, 1, 1, 1, 1, 0, 1],
    ]
    assert mask.int().tolist() == expected
