"""Features of requests decide scores, in training and from user states alike, and never those of another request."""

from dataclasses import replace

import numpy as np
import torch

from longer.arrays import Candidates, RequestBatch
from longer.model.inputs import to_tensors
from longer.model.longer import Longer
from longer.model.states import score
from longer.model_settings import ModelSettings
from longer.schema import EventSchema, Feature
from tests.model.generate import SCHEMA, SIZES, TASKS, encoded, pool_for, random_candidates, random_histories

ASKED = (Feature(name="device", kind="categorical", of="request"), Feature(name="page", kind="numeric", of="request"))
exactly = {"rtol": 1e-10, "atol": 1e-10}


def model_that_reads_requests() -> Longer:
    torch.manual_seed(0)
    model = Longer(ModelSettings(**SIZES), EventSchema(features=(*SCHEMA.features, *ASKED), tasks=SCHEMA.tasks), TASKS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.double().eval()


def outputs(model: Longer, batch: RequestBatch) -> np.ndarray:
    return model(to_tensors(batch)).detach().numpy()


def test_requests_that_share_a_history_have_each_their_own_features() -> None:
    rng, model = np.random.default_rng(1), model_that_reads_requests()
    history, counts = random_histories(rng, [11]), [3, 2, 4]
    of_items, request_C = random_candidates(rng, counts), np.repeat(np.arange(3), counts)
    device_R, page_R = np.array([5, 0, 8]), np.array([1.0, 0.0, 7.0], np.float32)
    candidates = replace(
        of_items, features={**of_items.features, "device": device_R[request_C], "page": page_R[request_C]}
    )
    rows, end_R = np.zeros(3, np.int64), np.full(3, 11)
    request_ts_R = np.full(3, 2_000_000_000_000)
    together = outputs(model, RequestBatch(history, rows, end_R, request_ts_R, candidates, np.arange(3)))
    for r in range(3):
        own = Candidates(np.array([0, counts[r]]), {name: x[request_C == r] for name, x in candidates.features.items()})
        alone = RequestBatch(history, rows[:1], end_R[:1], request_ts_R[:1], own, rows[:1])
        np.testing.assert_allclose(outputs(model, alone), together[request_C == r], **exactly)
        for name, other in (("device", 9), ("page", 3.0)):
            changed = {**own.features, name: np.full_like(own.features[name], other)}
            moved = outputs(model, replace(alone, candidates=replace(own, features=changed)))
            assert np.abs(moved - together[request_C == r]).max() > 1e-3, f"{name} is not read"
    pool = pool_for(model, 1)
    (state,) = encoded(model, pool, history)
    np.testing.assert_allclose(score(model, pool, [state] * 3, request_ts_R, candidates), together, **exactly)
