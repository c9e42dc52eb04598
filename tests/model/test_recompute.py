"""`train.recompute` keeps less for the gradient on every path, and gives the same gradient."""

import numpy as np
import pytest
import torch

from longer.model.encoders.factory import make_model
from longer.model.inputs import BatchTensors, to_tensors
from longer.model.longer import Longer
from longer.model.ranker import Ranker
from longer.model_settings import ModelSettings
from tests.model.generate import SCHEMA, SIZES, TASKS, one_request_a_row, random_candidates, random_histories

LONG = {"history_events": 96, "query_groups": 16, "stride_groups": 8, "event_width": 8}
MODELS = {
    "longer": LONG,
    "longer with dropout": {**LONG, "dropout": 0.3},
    "paper's encoding": {**LONG, "encoding": "paper"},
    "uniform queries": {**LONG, "queries": "uniform"},
    "transformer": {**LONG, "merge_size": 1, "stride_groups": 16, "encoder": {"kind": "transformer"}},
}


def batch_for(model: Ranker) -> BatchTensors:
    rng = np.random.default_rng(1)
    histories = random_histories(rng, [0, 70, 96])
    asked = one_request_a_row(model, histories, np.full(3, 2_000_000_000_000), random_candidates(rng, [5, 30, 30]))  # type: ignore[arg-type]
    return to_tensors(asked)


def kept_and_gradients(model: Ranker, batch: BatchTensors) -> tuple[int, list[torch.Tensor | None]]:
    """Bytes that a forward pass keeps beside the model and the batch, and the gradients."""
    torch.manual_seed(0)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    model.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch).square().sum()
    loss.backward()
    return sum(storage.nbytes() for storage in kept.values()), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_recomputation_keeps_less_and_changes_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = make_model(ModelSettings(**{**SIZES, **MODELS[name]}), SCHEMA, TASKS).train()
    batch, found = batch_for(model), []
    for recompute in (False, True):
        model.set_recompute(recompute)
        found.append(kept_and_gradients(model, batch))
    (kept, gradients), (less, again) = found
    assert less < 0.6 * kept, f"{less} of {kept} bytes are kept"
    for one, other in zip(gradients, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_large_table_s_reads_are_noted_once_however_often_they_are_made() -> None:
    """Noted twice, a row would learn twice as much as without recomputation."""
    torch.manual_seed(0)
    model = Longer(ModelSettings(**{**SIZES, **LONG}), SCHEMA, TASKS)
    batch, table, noted = batch_for(model), model.embedding.item, []
    for recompute in (False, True):
        model.set_recompute(recompute)
        table.reads = []
        model(batch).square().sum().backward()
        gradient_Ud = torch.zeros_like(table.embedding.weight)
        for rows_E, gradient_Ed in table.reads:
            gradient_Ud.index_add_(0, rows_E, gradient_Ed)
        noted.append(gradient_Ud)
    torch.testing.assert_close(*noted, rtol=1e-5, atol=1e-7)
