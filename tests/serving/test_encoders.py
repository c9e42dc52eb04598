"""Encoders that keep no user state: scored offline by their forward pass, refused wherever states are kept."""

from pathlib import Path

import numpy as np
import pytest
import torch

from longer.errors import UserError
from longer.model.encoders.factory import make_model, upstream_settings
from longer.model.encoders.ranker import EncoderRanker
from longer.model.inputs import to_tensors
from longer.model_settings import ModelSettings
from longer.serving.offline import score_lists
from longer.serving.questions import Budget, Questions
from longer.serving.scorer import Scorer
from longer.training.checkpoints import load_appendable, load_model, load_upstream, save_weights, weights_of
from tests.model.generate import SCHEMA, SIZES, TASKS, one_request_a_row, random_candidates, random_histories

PLAIN = {**SIZES, "merge_size": 1, "event_width": 8}
STATELESS = [{**PLAIN, "encoder": {"kind": "din"}}, {**SIZES, "queries": "uniform"}, {**SIZES, "encoding": "paper"}]


@pytest.mark.parametrize("sizes", STATELESS, ids=["din", "uniform queries", "paper"])
def test_offline_scores_are_the_forward_pass_of_each_request_alone(sizes: dict) -> None:
    rng = np.random.default_rng(4)
    model = make_model(ModelSettings(**sizes), SCHEMA, TASKS).double().eval()
    histories = random_histories(rng, [0, 9, 70, 33])
    row_R = np.array([3, 1, 2, 2, 0, 2, 3])
    end_R = np.array([33, 4, 69, 70, 0, 12, 5])
    ts_R = np.full(7, 2_000_000_000_000)
    candidates = random_candidates(rng, [3, 0, 2, 5, 1, 4, 2])
    found = score_lists(Questions(histories, row_R, end_R, ts_R), candidates, Budget(model, 1 << 24))
    alone = histories.slice_events(row_R, np.zeros(7, np.int64), end_R)
    expected = model(to_tensors(one_request_a_row(model, alone, ts_R, candidates))).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", STATELESS, ids=["din", "uniform queries", "paper"])
def test_a_request_with_very_many_candidates_is_scored_a_part_at_a_time(sizes: dict) -> None:
    """Else it takes memory by its candidates, whatever `batch_bytes` is: models without user states had no bound on a request."""
    rng, num_bytes, ends = np.random.default_rng(5), 1 << 20, np.array([70, 9])
    model = make_model(ModelSettings(**sizes), SCHEMA, TASKS).eval()
    questions = Questions(random_histories(rng, [70, 9]), np.arange(2), ends, np.full(2, 2 * 10**12))
    candidates = random_candidates(rng, [3_000, 4])
    whole = score_lists(questions, candidates, Budget(model, 1 << 40))
    asked = list[int]()
    model.register_forward_pre_hook(lambda _, batch: asked.append(int(batch[0].source.candidates.offsets_R1[-1])))
    found = score_lists(questions, candidates, Budget(model, num_bytes))
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
    a_candidate = Budget(model, num_bytes).token_bytes + 4 * model.cells_per_candidate(model.settings.history_events)
    assert sum(asked) == 3_004
    assert max(asked) * a_candidate <= num_bytes


@pytest.mark.parametrize("sizes", STATELESS, ids=["din", "uniform queries", "paper"])
def test_whoever_keeps_states_refuses_the_model_in_one_line(sizes: dict, tmp_path: Path) -> None:
    settings = ModelSettings(**sizes)
    save_weights(str(tmp_path), weights_of(make_model(settings, SCHEMA, TASKS)), settings, SCHEMA, TASKS)
    assert load_model(str(tmp_path))[1].model == settings
    with pytest.raises(UserError, match="no user state") as told:
        load_appendable(str(tmp_path))
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="no user state"):
        Scorer(str(tmp_path), "nowhere", 1 << 20)


def test_a_user_embedding_takes_its_towers_weights_and_no_others(tmp_path: Path) -> None:
    asked = ModelSettings(**PLAIN, encoder={"kind": "user_embedding", "upstream": str(tmp_path)})
    wanted = upstream_settings(asked)
    tower = make_model(wanted, SCHEMA, TASKS)
    save_weights(str(tmp_path), weights_of(tower), wanted, SCHEMA, TASKS)
    model = make_model(asked, SCHEMA, TASKS)
    load_upstream(model, asked)
    assert isinstance(model, EncoderRanker)
    pairs = zip(model.upstream.state_dict().values(), tower.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    narrower = asked.model_copy(update={"event_width": 4})
    with pytest.raises(UserError, match="event_width"):
        load_upstream(make_model(narrower, SCHEMA, TASKS), narrower)
    nothing = asked.model_copy(update={"encoder": asked.encoder.model_copy(update={"upstream": None})})
    with pytest.raises(UserError, match=r"model\.encoder\.upstream"):
        load_upstream(make_model(nothing, SCHEMA, TASKS), nothing)
