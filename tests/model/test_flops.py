"""Formulas against the paper's figures, and against passes that were counted."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longer.model.flops import layer_flops, layer_parameters, longer_flops, longer_parameters, merged_share
from longer.model.inputs import to_tensors
from tests.model.generate import one_request_a_row, random_candidates, random_histories, small_model


def test_the_papers_own_figures() -> None:
    """Section 3.4: 2,048 tokens of width 32 cost about 587M, merged by four about 336M, 42.8% less."""
    assert round(layer_flops(2048, 32) / 1e6) == 587
    assert round(layer_flops(512, 128) / 1e6) == 336
    assert merged_share(2048, 32, 4) == pytest.approx(layer_flops(512, 128) / layer_flops(2048, 32))
    assert layer_parameters(128) == 198_272


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("merge_size", [1, 4])
@pytest.mark.parametrize("num_self_layers", [0, 2])
def test_longers_sum_is_what_a_counted_pass_does(inner: bool, merge_size: int, num_self_layers: int) -> None:
    """One request with a full window, in sizes that need no padding; heads and numeric features are counted apart and taken off."""
    sizes = {"merge_size": merge_size, "event_width": 32 // merge_size, "history_events": 61 * merge_size}
    sizes |= {"query_groups": 13, "stride_groups": 1, "num_self_layers": num_self_layers, "inner_transformer": inner}
    model = small_model(dtype=torch.float32, queries="uniform", interactions=False, **sizes)
    rng, num_candidates = np.random.default_rng(0), 7
    histories = random_histories(rng, [61 * merge_size])
    candidates = random_candidates(rng, [num_candidates])
    batch = to_tensors(one_request_a_row(model, histories, np.array([2_000_000_000_000]), candidates))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch)
    heads = num_candidates * (2 * 32 * 64 + 2 * 64 * 2)
    numbers = 2 * (32 // merge_size) * (2 * len(batch.histories.event_ts_E) + num_candidates)
    expected = longer_flops(model.settings, 61, 13, num_candidates)
    assert counter.get_total_flops() - heads - numbers == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("inner", [True, False])
def test_longers_weights_are_counted(inner: bool) -> None:
    model = small_model(inner_transformer=inner)
    modules = [*model.blocks, model.embedding.merge, *([model.embedding.inner] if model.embedding.inner else [])]
    assert longer_parameters(model.settings) == sum(p.numel() for module in modules for p in module.parameters())
