"""What an arm of the study is trained on, tested on and compared with: figures that look right whatever these are.

R requests, C candidates, E events.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.quality_study import training
from benchmarks.quality_study.arms import Arm, Trained, model_settings
from benchmarks.quality_study.data import SCHEMAS, read_log
from benchmarks.quality_study.log import Log
from benchmarks.quality_study.training import TASKS, Budget
from longer.arrays import NO_EVENT_TS, Candidates, Histories
from longer.data.batches import Requests
from longer.hashing import stable_keys
from longer.model.encoders.factory import make_model
from tests.benchmarks.test_quality_arms import TINY
from tests.data.logs import DAY_MS
from tests.data.tables import KEEP_ALL, publish_sequences

A, B, C = 1, 2, 3
"""Items."""
BUDGET = Budget(40, 20, 40, 40, torch.device("cpu"))
LONGER = Arm("longer", "generated", "encoders", 0, features=False)

Asked = tuple[int, int, dict[int, int]]
"""A request: user, time, and the label of each candidate."""


def log_of(events: Iterable[tuple[int, int, int]], asked: Mapping[str, Sequence[Asked]], valid_from: int) -> Log:
    """Of events (user, time, item) and each split's requests; a history ends before its request's time."""
    user_E, ts_E, item_E = np.array(sorted(events)).T
    users, starts = np.unique(user_E, return_index=True)
    features = {"item_id": keys(item_E), "action": keys(item_E * 0), "category": keys(item_E)}
    none = np.full(len(users), NO_EVENT_TS)
    histories = Histories(keys(users), np.append(starts, len(user_E)), starts * 0, none, ts_E, features)
    requests = {split: requests_of(of_split, user_E, ts_E) for split, of_split in asked.items()}
    row_R = {split: np.searchsorted(users, [user for user, *_ in of_split]) for split, of_split in asked.items()}
    return Log("generated", SCHEMAS["generated"], histories, requests, row_R, valid_from)


def requests_of(asked: Sequence[Asked], user_E: np.ndarray, ts_E: np.ndarray) -> Requests:
    user_R, ts_R = (np.array([each[i] for each in asked]) for i in (0, 1))
    item_C = np.array([item for *_, label_of in asked for item in label_of])
    offsets = np.cumsum([0, *(len(label_of) for *_, label_of in asked)])
    return Requests(
        request_id_R=np.arange(len(asked)),
        user_id_R=pa.array(user_R),
        user_key_R=keys(user_R),
        request_ts_R=ts_R,
        history_end_R=np.array([((user_E == user) & (ts_E < ts)).sum() for user, ts, _ in asked]),
        candidates=Candidates(offsets, {"item_id": keys(item_C), "category": keys(item_C)}),
        item_id_C=pa.array(item_C),
        labels={"label": np.array([label for *_, label_of in asked for label in label_of.values()], np.float32)},
    )


def keys(values: np.ndarray) -> np.ndarray:
    return stable_keys(pa.array(values))


@pytest.fixture(scope="module")
def turned() -> Log:
    """40 events a user; A is liked, from 1,000 to the end of training B is, then A again."""
    events = [(user, time * 25, [A, B, C][(user + time) % 3]) for user in range(4) for time in range(40)]

    def asked(begin: int, liked: int) -> list[Asked]:
        return [(i % 4, begin + i, {A: int(liked == A), B: int(liked == B)}) for i in range(40)]

    splits = {"train": [*asked(500, A), *asked(1000, B)], "valid": asked(1100, A), "test": asked(1200, A)}
    return log_of(events, splits, valid_from=1100)


def trained(log: Log, arm: Arm = LONGER, how: Trained | None = None, base: Any = TINY) -> dict[str, Any]:
    return training.run(arm, base, log, BUDGET, how or Trained())


def test_an_arm_learns_the_newest_training_requests_and_nothing_later(turned: Log) -> None:
    """Whatever else it learned from would tell it that A is liked."""
    record = trained(turned, how=Trained(tables=0.05, dense=0.01, passes=10))
    assert record["final_loss"] < 0.2
    assert record["valid"]["auc"] < 0.05
    assert record["test"]["auc"] < 0.05


def test_passes_are_over_all_of_an_arms_requests(turned: Log) -> None:
    assert [trained(turned, how=Trained(passes=passes))["steps"] for passes in (1, 3)] == [2, 6]


def test_seeds_differ_in_weights_and_in_order_and_are_made_again_alike(turned: Log) -> None:
    """Else three rows of a table are one, and its spread nothing."""
    first, again, other = (trained(turned, replace(LONGER, seed=seed)) for seed in (0, 0, 1))
    assert first["final_loss"] == pytest.approx(again["final_loss"], rel=1e-6)
    nothing = Trained(1e-12, 1e-12)  # learned: what is left is where a seed begins
    begun = [trained(turned, replace(LONGER, seed=seed), nothing)["test"]["logloss"] for seed in (0, 0, 1)]
    assert begun[0] == pytest.approx(begun[1], rel=1e-6)
    assert begun[0] != pytest.approx(begun[2], rel=1e-3)
    ended = []
    for arm in (LONGER, replace(LONGER, seed=1)):
        torch.manual_seed(0)  # weights alike: what is left is the order of what is learned
        model = make_model(model_settings(arm, TINY), turned.schema, TASKS)
        training._train(model, turned, BUDGET, arm, BUDGET.train_settings(Trained(), "longer"))
        ended.append(torch.cat([weight.detach().flatten() for weight in model.dense_parameters()]))
    assert (ended[0] - ended[1]).abs().max() > 1e-4
    assert other["final_loss"] != pytest.approx(first["final_loss"], rel=1e-3)


def test_each_split_is_scored_on_as_many_requests_as_the_budget_says(turned: Log) -> None:
    few = replace(BUDGET, valid_requests=10, test_requests=30)
    record = training.run(LONGER, TINY, turned, few, Trained())
    assert (record["valid"]["rows"], record["test"]["rows"]) == (2 * 10, 2 * 30)  # two candidates each


@pytest.mark.parametrize("encoder", ["longer", "din"])
def test_a_records_parameters_are_those_that_are_trained(turned: Log, encoder: str) -> None:
    arm = replace(LONGER, encoder=encoder)
    record, model = trained(turned, arm), make_model(model_settings(arm, TINY), turned.schema, TASKS)
    every = sum(weight.numel() for weight in model.parameters())
    tables = sum(w.numel() for name, w in model.named_parameters() if ".embedding.weight" in name)
    assert record["dense_parameters"] + record["table_parameters"] == every
    assert record["table_parameters"] == tables


@pytest.mark.parametrize("encoder", ["longer", "din", "transformer"])
@pytest.mark.parametrize(("how", "tables_learn"), [(Trained(1e-9, 0.01), False), (Trained(0.01, 1e-9), True)])
def test_tables_and_dense_layers_learn_each_at_their_own_rate(
    turned: Log, how: Trained, tables_learn: bool, encoder: str
) -> None:
    torch.manual_seed(0)
    arm = replace(LONGER, encoder=encoder)
    model = make_model(model_settings(arm, TINY), turned.schema, TASKS)
    kinds = (model.embedding_parameters(), model.dense_parameters())
    before = [[weight.detach().clone() for weight in weights] for weights in kinds]
    training._train(model, turned, BUDGET, arm, BUDGET.train_settings(how, encoder))
    tables, dense = (
        max(float((weight.detach() - old).abs().max()) for weight, old in zip(weights, olds, strict=True))
        for weights, olds in zip(kinds, before, strict=True)
    )
    assert min(tables, dense) < 1e-6
    assert max(tables, dense) > 1e-3
    assert (tables > dense) == tables_learn


def test_an_arm_trained_on_short_histories_is_tested_on_longer_ones_with_its_own_weights(turned: Log) -> None:
    """Where nothing is learned, its weights are those of the arm that has the longer window from the start."""
    short, nothing = replace(LONGER, length=8), Trained(1e-12, 1e-12)
    arms = (short, replace(short, score_length=24), replace(LONGER, length=24))
    there, both, longer = (trained(turned, arm, nothing) for arm in arms)
    assert [each["length"] for each in (there, both, longer)] == [8, 8, 24]
    assert [each["window_events"] for each in (there, both, longer)] == [8, 24, 24]
    assert both["final_loss"] == pytest.approx(there["final_loss"], rel=1e-6)
    assert both["final_loss"] != pytest.approx(longer["final_loss"], rel=1e-5)
    assert both["test"]["logloss"] == pytest.approx(longer["test"]["logloss"], rel=1e-6)
    assert both["test"]["logloss"] != pytest.approx(there["test"]["logloss"], rel=1e-5)


def test_an_arm_is_trained_without_the_part_of_its_start_that_is_undone(turned: Log) -> None:
    undone = replace(LONGER, group="undone")
    plain, again, quiet = (trained(turned, replace(undone, undone=what)) for what in (None, None, "quiet items"))
    assert plain["final_loss"] == pytest.approx(again["final_loss"], rel=1e-5)
    assert plain["final_loss"] != pytest.approx(quiet["final_loss"], rel=1e-3)


@pytest.mark.parametrize("group", ["tuning", "tried", "undone"])
def test_what_steers_the_study_needs_no_test_split(turned: Log, group: str) -> None:
    """Rates that were chosen by it would flatter the encoder that was tried most often."""
    requests = {split: turned.requests[split] for split in ("train", "valid")}
    record = trained(replace(turned, requests=requests), replace(LONGER, group=group))
    assert record["valid"]["rows"] == 80
    assert not {"test", "long_auc_draws"} & set(record)


@pytest.fixture(scope="module")
def bought() -> Log:
    """User 1 has done four things when she is asked, user 2 two; later both take what they did not want when asked."""
    before = [(1, 10, A), (1, 20, A), (1, 30, B), (1, 40, C), (2, 20, B), (2, 150, C)]
    later = [(1, 300 + i, B) for i in range(4)] + [(2, 300 + i, A) for i in range(3)]
    asked: list[Asked] = [(1, 200, {A: 1, B: 0}), (2, 200, {A: 0, C: 1})]
    return log_of([*before, *later], {"train": asked, "valid": asked, "test": asked}, valid_from=100)


def test_baselines_know_nothing_of_what_came_later(bought: Log) -> None:
    found = training.baselines(bought, BUDGET, model_settings(LONGER, TINY), long_from=4)
    counts, popularity = found["count_all"], found["popularity"]
    assert counts["auc"] == pytest.approx(3.5 / 4)  # user 1: A 2, B 1; user 2: A 0, C 1
    assert counts["long_auc"] == 1
    assert popularity["auc"] == pytest.approx(1 / 4)  # until 100: A 2, B 2, C 1
    assert popularity["long_auc"] == 0.5


def test_draws_are_of_those_users_whose_histories_are_long(bought: Log) -> None:
    """Of one such user, every draw is she; the intervals would else be those of another figure."""
    found = training.baselines(bought, BUDGET, model_settings(LONGER, TINY), long_from=4)
    assert set(found["count_all"]["long_auc_draws"]) == {1.0}
    record = trained(bought, base=replace(TINY, long_from=4))
    assert record["test"]["long_rows"] == 2
    assert set(record["long_auc_draws"]) == {record["test"]["long_auc"]}


def test_negatives_are_items_that_are_bought_while_their_request_is_asked(tmp_path: Path) -> None:
    """A test's negatives from training's shelves would be told apart by their age alone."""
    rng, schema = np.random.default_rng(0), SCHEMAS["journey"]
    day, item = np.array([(day, 10 * day + i) for day in range(40) for i in rng.choice(10, 4, replace=False)]).T
    columns: dict[str, Any] = {
        "user_id": item % 2,
        "event_ts": (day + 17_000) * DAY_MS,
        "basket_id": day * 2 + item % 2,
        "item_id": item,
        "action": ["purchase"] * len(day),
        "category": [f"c{i % 5}" for i in item],
        "department": ["d"] * len(day),
        "quantity": np.ones(len(day), np.float32),
        "sales_value": np.ones(len(day), np.float32),
    }
    wanted = schema.events_arrow()
    events = pa.table({f.name: pa.array(columns[f.name]).cast(f.type) for f in wanted}, schema=wanted)
    publish_sequences(str(tmp_path / "tables/sequences"), events, schema, KEEP_ALL, num_buckets=1, row_group_events=50)
    log = read_log("journey", str(tmp_path))
    for split, requests in log.requests.items():
        days = requests.request_ts_R // DAY_MS - 17_000
        item_C, label_C = requests.item_id_C.to_numpy(), requests.labels["label"]
        drawn = item_C[label_C == 0]
        assert len(drawn) > 0, split
        assert days.min() <= drawn.min() // 10, split
        assert drawn.max() // 10 <= days.max(), split
