"""Formulas against the paper's figures, and against passes that were counted.

B histories, L tokens of one, T tokens that are queries, S that are keys, D width.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longer.model.attention import Block, attend_groups
from longer.model.encoders.transformer import CausalLayers
from longer.model.flops import layer_flops, layer_parameters, longer_flops, longer_parameters, merged_share
from longer.model.inputs import to_tensors
from longer.model_settings import ModelSettings
from tests.model.generate import one_request_a_row, random_candidates, random_histories, small_model


def test_the_papers_own_figures() -> None:
    """Section 3.4: 2,048 tokens of width 32 cost about 587M, merged by four about 336M, 42.8% less."""
    assert round(layer_flops(2048, 32) / 1e6) == 587
    assert round(layer_flops(512, 128) / 1e6) == 336
    assert merged_share(2048, 32, 4) == pytest.approx(layer_flops(512, 128) / layer_flops(2048, 32))
    assert layer_parameters(128) == 198_272


BLOCKS = [(48, 32, 4, 4), (96, 32, 2, 4), (64, 64, 8, 4), (13, 16, 1, 4), (64, 32, 4, 2), (40, 32, 4, 6)]
"""Tokens, width, heads, and the feed-forward layer's width over the token's."""


@pytest.mark.parametrize("block", BLOCKS)
def test_the_papers_layer_is_what_a_counted_layer_of_ours_does(block: tuple[int, int, int, int]) -> None:
    """To the last operation where the feed-forward layer is 4 times as wide. Of another ratio, its two products differ."""
    num_tokens, width, num_heads, ratio = block
    layers = CausalLayers(a_layer_of(width, num_heads, ratio), 1)
    counted = counted_flops(lambda: through_layers(layers, torch.randn(1, num_tokens, width)))
    assert counted == layer_flops(num_tokens, width) + (ratio - 4) * 2 * 2 * num_tokens * width**2


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("num_queries", [1, 8])
def test_a_cross_layer_is_the_papers_less_what_only_keys_do_not_have(
    num_queries: int, block: tuple[int, int, int, int]
) -> None:
    """Such a token has no query, reads nothing, and has no output and no feed-forward layer."""
    num_tokens, width, num_heads, ratio = block
    layer = Block(width, num_heads, ratio, dropout=0)
    x_1SD, place_1S = torch.randn(1, num_tokens, width), torch.arange(num_tokens)[None]

    def cross() -> None:
        x_1TD, place_1T = x_1SD[:, -num_queries:], place_1S[:, -num_queries:]
        seen_1TS = place_1S[:, None] <= place_1T[..., None]
        read_1TD = attend_groups(layer.queries(x_1TD, place_1T), *layer.keys_values(x_1SD, place_1S), seen_1TS)
        layer.finish(x_1TD, read_1TD)

    of_query_and_output, of_feed_forward, of_reading = 2 * 2 * width**2, 4 * ratio * width**2, 4 * num_tokens * width
    missing = (num_tokens - num_queries) * (of_query_and_output + of_feed_forward + of_reading)
    whole = layer_flops(num_tokens, width) + (ratio - 4) * 2 * 2 * num_tokens * width**2
    assert counted_flops(cross) == whole - missing


@pytest.mark.parametrize("block", BLOCKS)
def test_the_papers_weights_of_a_layer_are_those_of_ours(block: tuple[int, int, int, int]) -> None:
    """Of another ratio than 4, two matrices and the wide layer's bias differ."""
    _, width, num_heads, ratio = block
    layer = Block(width, num_heads, ratio, dropout=0)
    own = sum(parameter.numel() for parameter in layer.parameters())
    assert own == layer_parameters(width) + (ratio - 4) * (2 * width**2 + width)


@pytest.mark.parametrize("merge_size", [2, 4, 8])
def test_merging_saves_what_the_paper_says_of_a_counted_layer(merge_size: int) -> None:
    num_tokens, width = 256, 8
    before, after = (
        counted_flops(lambda k=k: through_layers(of_width(k * width), torch.randn(1, num_tokens // k, k * width)))
        for k in (1, merge_size)
    )
    assert after / before == pytest.approx(merged_share(num_tokens, width, merge_size), rel=1e-12)


def a_layer_of(width: int, num_heads: int, ratio: int) -> ModelSettings:
    sizes = {"merge_size": 1, "event_width": width, "num_heads": num_heads, "feed_forward_ratio": ratio}
    return ModelSettings(encoder={"kind": "transformer"}, **sizes)


def of_width(width: int) -> CausalLayers:
    return CausalLayers(a_layer_of(width, num_heads=2, ratio=4), 1)


def through_layers(layers: CausalLayers, x_BLD: torch.Tensor) -> None:
    for block in layers:
        x_BLD = layers.layer(block, x_BLD, *layers.keys_values(block, x_BLD))


def counted_flops(forward: Callable[[], object]) -> int:
    """Of every product of matrices in it; hidden scores are computed, as the paper counts them."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


SWITCHES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "uniform queries": {"queries": "uniform"},
    "recent and uniform queries": {"queries": "recent_uniform"},
    "learnable queries": {"queries": "learnable"},
    "paper's encoding": {"encoding": "paper"},
    "paper's encoding, learnable queries": {"encoding": "paper", "queries": "learnable"},
    "no InnerTrans": {"inner_transformer": False},
    "no globals": {"num_cls_tokens": 0, "num_user_tokens": 0},
    "other globals and ratio": {"num_cls_tokens": 0, "num_user_tokens": 3, "feed_forward_ratio": 2},
}


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("merge_size", [1, 4])
@pytest.mark.parametrize("num_self_layers", [0, 2])
def test_longers_sum_is_what_a_counted_pass_does(
    switches: dict[str, Any], merge_size: int, num_self_layers: int
) -> None:
    """One request with a full window, in sizes that need no padding; a thousandth may differ.

    Heads and numeric features are counted apart and taken off. What the counter does not see is added: sums taken
    elementwise, and what groups would read of tails, which the mask hides.
    """
    num_groups, num_candidates, d = 64 if switches.get("queries") == "learnable" else 61, 7, 32 // merge_size
    sizes = {"merge_size": merge_size, "event_width": d, "history_events": num_groups * merge_size}
    sizes |= {"query_groups": 13, "stride_groups": 1, "num_self_layers": num_self_layers}
    model = small_model(dtype=torch.float32, interactions=False, **sizes, **switches)
    rng = np.random.default_rng(0)
    histories = random_histories(rng, [num_groups * merge_size])
    candidates = random_candidates(rng, [num_candidates])
    batch = to_tensors(one_request_a_row(model, histories, np.array([2_000_000_000_000]), candidates))
    seen = counted_flops(lambda: model(batch))
    heads = num_candidates * (2 * 32 * 64 + 2 * 64 * 2)
    numbers = 2 * d * (2 * len(batch.histories.event_ts_E) + num_candidates)
    num_tail = 1 + model.embedding.num_globals
    tail_readers = num_self_layers * (13 + num_tail) + (num_self_layers + 1) * num_candidates
    of_tails = 4 * tail_readers * num_tail * 32 * model.settings.is_appendable
    alone = num_candidates + num_groups * (merge_size == 1) * model.settings.is_appendable
    of_groups_of_one = 4 * alone * d * model.settings.inner_transformer
    counted = seen - heads - numbers + of_tails + of_groups_of_one
    assert counted == pytest.approx(longer_flops(model.settings, num_groups, 13, num_candidates), rel=1e-3)


@pytest.mark.parametrize("inner", [True, False])
def test_longers_weights_are_counted(inner: bool) -> None:
    model = small_model(inner_transformer=inner)
    modules = [*model.blocks, model.embedding.merge, *([model.embedding.inner] if model.embedding.inner else [])]
    assert longer_parameters(model.settings) == sum(p.numel() for module in modules for p in module.parameters())
