"""Gradients of tables that every event reads: the kernel against float64; without a GPU, in Triton's interpreter if installed."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.model.small_tables import Lookup, read_rows

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if ON_CUDA else "cpu"
pytestmark = pytest.mark.kernels


def gradient_of(weight: torch.Tensor, read: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad((read * direction.to(read)).sum(), weight)
    return gradient.cpu().double()


@given(
    seed=st.integers(0, 2**32 - 1),
    num_reads=st.integers(0, 300),
    num_rows=st.sampled_from([1, 5, 65, 4096]),
    width=st.sampled_from([1, 16, 20, 64, 200]),
)
@settings(max_examples=40 if ON_CUDA else 10, deadline=None)
def test_a_row_that_everybody_reads_has_the_sum_of_all_their_gradients(
    seed: int, num_reads: int, num_rows: int, width: int
) -> None:
    pytest.importorskip("triton", reason="the kernel needs Triton: CUDA builds of PyTorch bring it")
    generator = torch.Generator().manual_seed(seed)
    rows = (num_rows * torch.rand(num_reads, generator=generator) ** 4).long()
    direction = torch.randn(num_reads, width, generator=generator)
    exact = torch.randn(num_rows, width, dtype=torch.float64, generator=generator).requires_grad_()
    ours = exact.detach().float().to(DEVICE).requires_grad_()
    read = Lookup.apply(ours, rows.to(DEVICE))
    assert torch.equal(read.cpu(), ours.detach().cpu()[rows])
    wanted = gradient_of(exact, read_rows(exact, rows), direction)
    torch.testing.assert_close(gradient_of(ours, read, direction), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not ON_CUDA, reason="compiled on CUDA only")
def test_a_compiled_reader_of_several_tables_in_a_cuda_graph_has_the_gradients_of_an_eager_one() -> None:
    """Hot rows and rare ones, a batch of more than one program, shapes that differ from call to call."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 64, generator=generator).to(DEVICE).requires_grad_() for rows in (5, 65, 168, 4096)]

    def read(rows: list[torch.Tensor]) -> torch.Tensor:
        summed = sum(read_rows(weight, r) for weight, r in zip(weights, rows, strict=True))
        return torch.nn.functional.layer_norm(summed, (64,))

    compiled = torch.compile(read, dynamic=True)
    for num_groups in (700, 1300):
        rows = [
            (len(weight) * torch.rand(num_groups, 8, generator=generator) ** 4).long().to(DEVICE) for weight in weights
        ]
        direction = torch.randn(num_groups, 8, 64, generator=generator).to(DEVICE)
        exact = [weight.detach().double().requires_grad_() for weight in weights]
        summed = sum(torch.nn.functional.embedding(r, weight) for weight, r in zip(exact, rows, strict=True))
        wanted = torch.autograd.grad((torch.nn.functional.layer_norm(summed, (64,)) * direction.double()).sum(), exact)
        for _ in range(2):  # the first one compiles
            torch.autograd.grad((compiled(rows) * direction).sum(), weights)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            ours = torch.autograd.grad((compiled(rows) * direction).sum(), weights)
        graph.replay()
        for found, expected in zip(ours, wanted, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
