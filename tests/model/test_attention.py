"""Attention over shared context and rotary positions, against the textbook."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.model.attention import SEARCH_SCALE, Block, Rotation, attend_shared


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


def test_search_finds_an_equal_token_at_any_distance() -> None:
    """Where pairs of channels turned in it, an item bought a year ago scored like any other."""
    torch.manual_seed(0)
    block = Block(64, 4, 2, 0.0)
    block.make_search(torch.randn(64))
    token = torch.randn(64)
    query = block.queries(token, torch.tensor(10_000))
    keys, _ = block.keys_values(token.expand(2, -1), torch.tensor([3, 9_999]))
    far, near = torch.einsum("hz,khz->kh", query, keys) / 16**0.5
    torch.testing.assert_close(far, near)
    assert 0.9 * SEARCH_SCALE < far.mean() <= SEARCH_SCALE


def test_values_of_a_search_begin_to_tell_marked_tokens_alike_in_all_heads() -> None:
    """Where each head told of what it had found in directions of its own, a linear layer hardly read it off."""
    torch.manual_seed(0)
    block, mark_D = Block(64, 4, 2, 0.0), torch.randn(64)
    at_random = block.key_value.weight[64:].detach().clone()
    block.make_search(mark_D)
    torch.testing.assert_close((block.key_value.weight[64:] - at_random) @ mark_D, torch.ones(64))
