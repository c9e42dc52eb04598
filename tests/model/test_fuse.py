"""Compilations take seconds each in every process, so none happens that is not needed."""

from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from longer.model import fuse


@pytest.fixture
def compilations() -> Iterator[CompileCounter]:
    """Counts what would be compiled on a GPU."""
    counter = CompileCounter()
    with (
        patch.object(fuse, "has_kernels", return_value=True),
        patch.object(torch, "compile", partial(torch.compile, backend=counter)),
    ):
        yield counter


def sums() -> Callable[[Tensor, Tensor], Tensor]:
    return fuse.fused_on_cuda(lambda x_N, y_M: x_N.sum() + y_M.sum())


def test_sizes_that_agree_by_chance_in_one_call_need_not_in_the_next(compilations: CompileCounter) -> None:
    total = sums()
    for n, m in ((3, 3), (4, 5), (7, 2)):
        assert total(torch.ones(n), torch.ones(m)) == n + m
    assert compilations.frame_count == 1


def test_what_is_computed_plainly_is_not_compiled(compilations: CompileCounter) -> None:
    total = sums()
    with fuse.plainly():
        assert total(torch.ones(3), torch.ones(4)) == 7
    assert compilations.frame_count == 0
    assert total(torch.ones(3), torch.ones(4)) == 7
    assert compilations.frame_count == 1
