"""Formulas against the paper's figures, and against passes that were counted."""

from typing import Any

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
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch)
    heads = num_candidates * (2 * 32 * 64 + 2 * 64 * 2)
    numbers = 2 * d * (2 * len(batch.histories.event_ts_E) + num_candidates)
    num_tail = 1 + model.embedding.num_globals
    tail_readers = num_self_layers * (13 + num_tail) + (num_self_layers + 1) * num_candidates
    of_tails = 4 * tail_readers * num_tail * 32 * model.settings.is_appendable
    alone = num_candidates + num_groups * (merge_size == 1) * model.settings.is_appendable
    of_groups_of_one = 4 * alone * d * model.settings.inner_transformer
    counted = counter.get_total_flops() - heads - numbers + of_tails + of_groups_of_one
    assert counted == pytest.approx(longer_flops(model.settings, num_groups, 13, num_candidates), rel=1e-3)


@pytest.mark.parametrize("inner", [True, False])
def test_longers_weights_are_counted(inner: bool) -> None:
    model = small_model(inner_transformer=inner)
    modules = [*model.blocks, model.embedding.merge, *([model.embedding.inner] if model.embedding.inner else [])]
    assert longer_parameters(model.settings) == sum(p.numel() for module in modules for p in module.parameters())
