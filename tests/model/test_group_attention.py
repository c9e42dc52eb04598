"""Attention inside groups: the kernel against plain PyTorch in float64; without a GPU, in Triton's interpreter where installed."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.model.group_attention import _GroupAttention, attend_in_groups

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="the kernels need Triton: CUDA builds of PyTorch bring it")
DEVICE = "cuda" if ON_CUDA else "cpu"
pytestmark = pytest.mark.kernels


@given(
    seed=st.integers(0, 2**32 - 1),
    num_groups=st.integers(1, 30),
    group_size=st.sampled_from([2, 3, 8, 17]),
    width=st.sampled_from([4, 16, 20, 64]),
)
@settings(max_examples=40 if ON_CUDA else 8, deadline=None)
def test_events_gather_over_the_existing_events_of_their_own_group_only(
    seed: int, num_groups: int, group_size: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    qkv_NKd = torch.randn(num_groups, group_size, 3 * width, generator=generator)
    size_N = torch.randint(0, group_size + 1, (num_groups,), generator=generator)
    exists_NK = torch.arange(group_size) < size_N[:, None]
    direction_NKd = torch.randn(num_groups, group_size, width, generator=generator) * exists_NK[..., None]
    results = []
    for function, x in ((attend_in_groups, qkv_NKd.double()), (_GroupAttention.apply, qkv_NKd.to(DEVICE))):
        x.requires_grad_()
        out_NKd = function(x, exists_NK.to(x.device))
        (gradient_NKd,) = torch.autograd.grad((out_NKd * direction_NKd.to(x)).sum(), x)
        results.append((out_NKd[exists_NK.to(x.device)].detach().cpu().double(), gradient_NKd.cpu().double()))
    for ours, exact in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
