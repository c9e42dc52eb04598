"""What fewer bits cost is measured from states that grow, on the split's own requests."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.model_arms.sizes import ON_CUDA
from benchmarks.state_precision import by_forward, from_states, measured, shown, waves
from longer.data.batches import Requests
from longer.model.longer import Longer
from longer.serving.room import BATCH_USERS
from longer.training.loader import SplitData
from tests.model.generate import random_candidates, random_histories, small_model
from tests.model.tolerances import OF_TESTED_MODELS, TOLERANCE


def split_of(model: Longer, num_users: int) -> SplitData:
    """One to five requests a user over windows that move, in no order."""
    rng = np.random.default_rng(0)
    histories = random_histories(rng, [60] * num_users)
    row_R = rng.permutation(np.repeat(np.arange(num_users), rng.integers(1, 6, num_users)))
    end_R = rng.integers(1, 61, len(row_R))
    counts = rng.integers(1, 9, len(row_R))
    num_candidates = int(counts.sum())
    requests = Requests(
        request_id_R=np.arange(len(row_R)),
        user_id_R=pa.array(row_R),
        user_key_R=histories.user_key_B[row_R],
        request_ts_R=2_000_000_000_000 + end_R,
        history_end_R=end_R,
        candidates=random_candidates(rng, counts.tolist()),
        item_id_C=pa.array(range(num_candidates)),
        labels={"click": rng.integers(0, 2, num_candidates).astype(np.float32)},
    )
    return SplitData(histories, requests, row_R, model.windows)


def test_every_request_is_in_one_wave_each_users_in_order_of_time_and_a_user_keeps_her_place() -> None:
    data = split_of(small_model(), BATCH_USERS + 3)
    asked = list[int]()
    for batch in waves(data):
        users = data.row_R[batch[0]]
        for wave_R, next_R in zip(batch, [*batch[1:], np.zeros(0, np.int64)], strict=True):
            asked += wave_R.tolist()
            assert (data.row_R[wave_R] == users[: len(wave_R)]).all()
            assert (data.requests.request_ts_R[wave_R[: len(next_R)]] <= data.requests.request_ts_R[next_R]).all()
    assert sorted(asked) == list(range(len(data.requests)))


@pytest.mark.skipif(ON_CUDA, reason="states in fewer bits are compiled and captured there, for minutes")
def test_states_answer_the_split_as_the_forward_pass_does_and_in_fewer_bits_nearly_so() -> None:
    """An arm that scored others' candidates, or a state that missed events, would tell a cost of something else."""
    model = small_model(0, torch.float32)
    data = split_of(model, 12)
    exact = from_states(model, data, "float32")
    np.testing.assert_allclose(by_forward(model, data).probability_C, exact.probability_C, rtol=1e-5, atol=1e-6)
    row = measured(from_states(model, data, "int8"), exact, data)
    assert 0 < row["mean_difference"] < row["largest_difference"] <= OF_TESTED_MODELS["int8"]
    assert row["state_bytes"] < exact.state_bytes
    assert f"| {TOLERANCE['int8']:g} |" in shown(row, row)
    assert f"| {TOLERANCE['int8']:g}, exceeded |" in shown(row | {"largest_difference": 0.009}, row)
    same = measured(exact, exact, data)
    assert (same["largest_difference"], 0.3 < same["auc"] < 0.7) == (0, True)
