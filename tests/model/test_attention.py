"""Attention over shared context and rotary positions, against the textbook."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.model.attention import Rotation, attend_shared


@given(st.integers(0, 2**31), st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_shared_context_attention_is_plain_softmax_over_all_visible_keys(
    seed: int, queries: list[int], groups: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    total, heads, width, private = sum(queries), 2, 4, 3

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key, value = (
        random(total, heads, width),
        random(len(queries), groups, heads, width),
        random(len(queries), groups, heads, width),
    )
    private_key, private_value = random(total, private, heads, width), random(total, private, heads, width)
    num_visible = torch.randint(0, groups + 1, (total,), generator=generator)
    allowed = torch.rand(total, private, generator=generator) < 0.5
    allowed[:, -1] = True
    out = attend_shared(query, key, value, queries, num_visible, private_key, private_value, allowed)
    assert out.shape == (total, heads * width)
    row = [b for b, n in enumerate(queries) for _ in range(n)]
    for p in range(total):
        keys = torch.cat([key[row[p], : num_visible[p]], private_key[p, allowed[p]]])
        values = torch.cat([value[row[p], : num_visible[p]], private_value[p, allowed[p]]])
        weights = (torch.einsum("hz,khz->hk", query[p], keys) / width**0.5).softmax(-1)
        torch.testing.assert_close(
            out[p], torch.einsum("hk,khz->hz", weights, values).flatten(), rtol=1e-12, atol=1e-12
        )


def test_rotation_depends_on_differences_only_even_after_a_billion_groups() -> None:
    rotation = Rotation(8)
    query, key = torch.randn(2, 1, 8).double()
    near = (rotation(query, torch.tensor(12)) * rotation(key, torch.tensor(5))).sum()
    far = (rotation(query, torch.tensor(10**9 + 12)) * rotation(key, torch.tensor(10**9 + 5))).sum()
    torch.testing.assert_close(near, far, rtol=1e-6, atol=1e-6)
    other = (rotation(query, torch.tensor(13)) * rotation(key, torch.tensor(5))).sum()
    assert not torch.allclose(near, other)
