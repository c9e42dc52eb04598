"""Every encoder that attends begins as a search for the candidate's own item: what is compared is not who began well.

From other first weights it would be found by chance that equal items should score high.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from longer.arrays import Candidates, Histories
from longer.model.encoders.factory import make_model
from longer.model.encoders.ranker import EncoderRanker
from longer.model.inputs import to_tensors
from longer.model.ranker import Ranker
from longer.model_settings import ModelSettings
from tests.model.encoders.test_equations import ENCODERS, name_of
from tests.model.generate import SCHEMA, SIZES, TASKS, one_request_a_row, random_candidates, random_histories

NUM_EVENTS, OWN, NO_ITEM_OF_THE_HISTORY, NO_CATEGORY = 20, 9, 500, 7
WIDE: dict[str, Any] = {**SIZES, "item_rows": 1000, "inner_transformer": False, "interactions": False}
SEARCHES = [
    e for e in ENCODERS if e["kind"] in ("din", "sim", "twin", "transformer", "hstu") and "recent_events" not in e
]
MERGES = {
    "no merging": {"merge_size": 1, "event_width": 64},
    "merged": {"merge_size": 2, "event_width": 32},
    "merged, InnerTrans": {"merge_size": 2, "event_width": 32, "inner_transformer": True},
}


@pytest.mark.parametrize("encoder", SEARCHES, ids=name_of)
def test_encoders_that_attend_begin_as_a_search_for_the_candidates_own_item(encoder: dict[str, Any]) -> None:
    wider = {"top_events": NUM_EVENTS} if "top_events" in encoder else {}
    wider |= {"num_layers": 1} if encoder["kind"] == "hstu" else {}  # its last gathers at random
    check({**MERGES["no merging"], "encoder": {**encoder, **wider}})


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("queries", ["recent", "uniform", "learnable", "recent_uniform"])
@pytest.mark.parametrize("encoding", ["appendable", "paper"])
def test_longer_begins_as_a_search_whatever_its_switches(encoding: str, queries: str, merge: dict[str, Any]) -> None:
    """Of `encoding: paper`, events once passed through a random map that candidates did not: nothing could be found."""
    check({**merge, "encoding": encoding, "queries": queries, "num_self_layers": 1})


def check(sizes: dict[str, Any]) -> None:
    """Of all events, that of the candidate's item weighs most in what the candidate read, for any first weights."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = make_model(ModelSettings(**{**WIDE, **sizes}), SCHEMA, TASKS).double().eval()
        assert int(np.argmax(weights_of_events(model, seed))) == OWN


def weights_of_events(model: Ranker, seed: int) -> list[float]:
    """What another item in its place changes in what is read, for every event but the newest two, which SIM reads apart."""
    rng = np.random.default_rng(seed)
    histories, candidates = random_histories(rng, [NUM_EVENTS]), random_candidates(rng, [1])
    histories.features["item_id"][:] = np.arange(NUM_EVENTS) + 1
    histories.features["category"][:] = np.arange(NUM_EVENTS) % 3 + 1  # others of the candidate's too
    for name, values in candidates.features.items():
        values[:] = histories.features[name][OWN]
    whole = read(model, histories, candidates)
    others = [read(model, without(histories, event), candidates) for event in range(NUM_EVENTS - 2)]
    return [float((other - whole).norm()) for other in others]


def without(histories: Histories, event: int) -> Histories:
    """An absence would move all later events to other groups and places."""
    features = {name: values.copy() for name, values in histories.features.items()}
    features["item_id"][event], features["category"][event] = NO_ITEM_OF_THE_HISTORY, NO_CATEGORY
    return replace(histories, features=features)


@torch.no_grad()
def read(model: Ranker, histories: Histories, candidates: Candidates) -> torch.Tensor:
    """[1, D]: what the encoder gives the candidate; of LONGER, the candidate as it leaves the last layer."""
    batch = to_tensors(one_request_a_row(model, histories, np.array([2_000_000_000_000]), candidates))
    if isinstance(model, EncoderRanker):
        assert model.encoder is not None
        return model.encode(model.encoder, batch, model.entered(batch)[0])
    left: list[torch.Tensor] = []
    hook = model.norm_head.register_forward_pre_hook(lambda _, args: left.append(args[0]))
    model(batch)
    hook.remove()
    return left[0]
