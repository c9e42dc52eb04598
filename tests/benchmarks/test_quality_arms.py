"""The study's data and arms: what would change its figures without anything failing.

R requests, C candidates, D width.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.quality_study import training
from benchmarks.quality_study.arms import BASES, ITSELF, QUICK, UNDO, Arm, Base, Trained, model_settings
from benchmarks.quality_study.control import NoHistory
from benchmarks.quality_study.data import SCHEMAS, read_log
from benchmarks.quality_study.grid import grid
from benchmarks.quality_study.log import Log
from benchmarks.quality_study.training import TASKS as STUDY_TASKS
from benchmarks.quality_study.training import Budget, undo
from longer.hashing import stable_keys
from longer.model.attention import Block, Rotation
from longer.model.encoders.factory import make_model
from longer.model.encoders.ranker import EncoderRanker
from longer.model.flops import longer_flops
from longer.model.inputs import to_tensors
from longer.model.longer import Longer
from longer.model.ranker import Ranker
from longer.model_settings import ModelSettings
from longer.table_settings import GenerateSettings
from tests.data.logs import DAY_MS
from tests.data.tables import KEEP_ALL, publish_sequences
from tests.model.generate import SCHEMA, SIZES, TASKS, one_request_a_row, random_candidates, random_histories
from tests.model.reference import Raw, recounted

SPLITS = ("train", "valid", "test")
TINY = Base(length=24, width=16, num_queries=4, num_layers=1, long_from=10, category="category")


def films(folder: Path) -> list[tuple[int, int, float, int]]:
    """MovieLens as its package holds it: (user, film, rating, second) of ratings in no order, with ties in time."""
    rng, ratings = np.random.default_rng(0), []
    for user in (7, 3, 12, 5):
        second = 1_000_000 + rng.integers(0, 1000)
        for film in rng.choice(30, 25, replace=False) + 1:
            second += int(rng.choice([0, 0, 40, 3000]))
            ratings.append((user, int(film), float(rng.integers(1, 6)), int(second)))
    ratings = [ratings[i] for i in rng.permutation(len(ratings))]
    rows = ["\t".join(map(str, row)) for row in ratings]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "ml-100k.inter").write_text("\n".join([header, *rows]) + "\n")
    names = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    each = [f"{film}\tFilm {film}\t1990\t{'Drama' if film % 2 else 'War Comedy'}" for film in range(1, 31)]
    (folder / "ml-100k.item").write_text("\n".join([names, *each]) + "\n")
    return ratings


def test_a_rated_film_is_not_in_its_own_history_nor_is_what_was_rated_in_the_same_second(tmp_path: Path) -> None:
    ratings = films(tmp_path)
    log = read_log("movielens", str(tmp_path))
    key_of = {film: int(stable_keys(pa.array([film]))[0]) for film in range(1, 31)}
    found = []
    for split in SPLITS:
        requests = log.requests[split]
        for r, (user, film) in enumerate(
            zip(requests.user_id_R.to_pylist(), requests.item_id_C.to_pylist(), strict=True)
        ):
            (mine,) = [row for row in ratings if row[:2] == (user, film)]
            earlier = [row for row in ratings if row[0] == user and row[3] < mine[3]]
            assert requests.request_ts_R[r] == mine[3] * 1000
            assert requests.labels["label"][r] == (mine[2] >= 4)
            assert requests.candidates.features["item_id"][r] == key_of[film]
            assert requests.history_end_R[r] == len(earlier)
            begin = log.histories.offsets_B1[log.row_R[split][r]]
            seen = log.histories.features["item_id"][begin : begin + len(earlier)].tolist()
            assert sorted(seen) == sorted(key_of[row[1]] for row in earlier)
            found.append((user, film))
    assert sorted(found) == sorted(row[:2] for row in ratings)  # each rating in one split
    check_splits(log)
    assert 0.7 < len(log.requests["train"]) / len(ratings) < 0.9


def check_splits(log: Log) -> None:
    """Every request of a split is asked after all of those before it."""
    times = [log.requests[split].request_ts_R for split in SPLITS]
    assert times[0].max() < log.valid_from_ms <= times[1].min()
    assert times[1].max() < times[2].min()


def test_a_basket_is_asked_about_with_the_events_strictly_before_it(tmp_path: Path) -> None:
    rng, schema, rows = np.random.default_rng(1), SCHEMAS["journey"], []
    for who in (4, 9, 2):
        for on in range(40):
            for number in range(rng.integers(0, 3)):  # of two baskets of one time neither is the other's past
                rows += [(who, on, who * 1000 + on * 10 + number, int(i)) for i in rng.choice(50, 3, replace=False)]
    user, day, basket, item = (np.array(column) for column in zip(*rows, strict=True))
    columns = {
        "user_id": user,
        "event_ts": (day + 17_000) * DAY_MS,
        "basket_id": basket,
        "item_id": item,
        "action": ["purchase"] * len(rows),
        "category": [f"c{i % 5}" for i in item],
        "department": [f"d{i % 2}" for i in item],
        "quantity": np.ones(len(rows), np.float32),
        "sales_value": np.ones(len(rows), np.float32),
    }
    wanted = schema.events_arrow()
    events = pa.table({f.name: pa.array(columns[f.name]).cast(f.type) for f in wanted}, schema=wanted)
    publish_sequences(str(tmp_path / "tables/sequences"), events, schema, KEEP_ALL, num_buckets=2, row_group_events=50)
    log, asked = read_log("journey", str(tmp_path)), []
    for split in SPLITS:
        requests = log.requests[split]
        item_C, label_C = requests.item_id_C.to_pylist(), requests.labels["label"]
        for r, mine in enumerate(requests.user_id_R.to_pylist()):
            today = int(requests.request_ts_R[r]) // DAY_MS - 17_000
            assert requests.history_end_R[r] == ((user == mine) & (day < today)).sum()
            assert log.histories.user_key_B[log.row_R[split][r]] == requests.user_key_R[r]
            own = range(*requests.candidates.offsets_R1[r : r + 2])
            bought = {item_C[c] for c in own if label_C[c] == 1}
            of_baskets = [
                set(item[basket == b].tolist()) for b in set(basket[(user == mine) & (day == today)].tolist())
            ]
            assert bought in of_baskets
            assert 0 < len(own) - len(bought) <= 4 * len(bought)
            asked.append((mine, today, tuple(sorted(bought))))
    assert len(asked) == len(set(basket.tolist()))
    check_splits(log)


@pytest.fixture(scope="module")
def generated() -> Log:
    sizes = GenerateSettings(num_users=20, num_events=6_000, num_items=300, num_clusters=30)
    return read_log("generated", "", sizes=sizes)


def test_the_frozen_tower_is_the_one_that_was_trained(generated: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Ranker, dict[str, torch.Tensor]]] = []
    train = training._train

    def noted(model: Ranker, *about: object) -> object:
        seen.append((model, {name: weight.clone() for name, weight in model.state_dict().items()}))
        return train(model, *about)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "_train", noted)
    budget = Budget(64, 32, 20, 20, torch.device("cpu"))
    arm = Arm("user_embedding", "generated", "encoders", 0, encoder="user_embedding", features=False)
    training.run(arm, TINY, generated, budget, Trained())
    (tower, at_first), (model, _) = seen
    assert isinstance(model, EncoderRanker)
    trained = tower.state_dict()
    assert any(not torch.equal(trained[name], weight) for name, weight in at_first.items())
    for name, weight in model.upstream.state_dict().items():
        assert torch.equal(weight, trained[name]), name


@pytest.mark.parametrize("interactions", [True, False])
def test_longer_without_history_has_all_layers_over_the_candidate_alone(interactions: bool) -> None:
    torch.manual_seed(0)
    model = NoHistory(ModelSettings(**SIZES, interactions=interactions), SCHEMA, TASKS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model = model.double().eval()
    rng, request_ts = np.random.default_rng(0), 2_000_000_000_000
    history, candidates = random_histories(rng, [11]), random_candidates(rng, [3])
    found = model(to_tensors(one_request_a_row(model, history, np.array([request_ts]), candidates)))
    raw, asked = Raw(model), candidates.features
    counts_CF = recounted(raw, history, 0, request_ts, asked)
    x_CD = raw.candidates(asked, request_ts, int(history.event_ts_E[-1]), SIZES["merge_size"], counts_CF)
    for layer in range(SIZES["num_self_layers"] + 1):
        x_CD = raw.block(f"blocks.{layer}", x_CD, torch.zeros(3), torch.eye(3, dtype=torch.bool), 0)
    left = raw.norm("norm_head", x_CD)
    left = left if counts_CF is None else torch.cat([left, counts_CF], dim=1)
    torch.testing.assert_close(found, raw.head(left, asked["item_id"]), rtol=1e-9, atol=1e-9)


def fresh_longer() -> Longer:
    torch.manual_seed(0)
    arm = Arm("longer", "journey", "undone", 0)
    model = make_model(model_settings(arm, QUICK["journey"]), SCHEMAS["journey"], STUDY_TASKS)
    assert isinstance(model, Longer)
    return model


CHANGED = {
    "first layer not a search": {
        f"blocks.0.{part}.{kind}" for part in ("query", "key_value") for kind in ("weight", "bias")
    },
    "merge not concatenation": {"embedding.merge.weight", "embedding.merge.bias"},
    "loud numbers": {f"embedding.event_numbers.{name}.weight" for name in ("quantity", "sales_value")},
    "quiet items": {"embedding.item.embedding.weight"}
    | {f"embedding.item_categories.{name}.embedding.weight" for name in ("category", "department")},
    "values without the mark": {"blocks.0.key_value.weight"},
    "first layer turns": set(),
    "all pairs turn": set(),
}


def test_items_are_as_wide_as_longers_where_tables_are_to_be_of_one_size() -> None:
    def item_shape(arm: Arm) -> tuple[int, int]:
        sizes = model_settings(arm, BASES["journey"])
        return sizes.item_rows, sizes.event_width

    longer = item_shape(Arm("longer", "journey", "encoders", 0, features=False))
    arms = [arm for arm in grid("journey", False, 1) if arm.group == "tables"]
    assert len(arms) > 5
    assert {item_shape(arm) for arm in arms} == {longer}


def test_undoing_a_part_of_the_start_changes_that_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {*CHANGED, UNDO[-1]} == set(UNDO)
    before, width = fresh_longer().state_dict(), QUICK["journey"].width
    models = {what: fresh_longer() for what in UNDO}
    for what, model in models.items():
        undo(model, what)
        changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
        assert changed == (set().union(*CHANGED.values()) if what == UNDO[-1] else CHANGED[what]), what
    turned = {what: [layer.rotation.num_turned for layer in model.layers] for what, model in models.items()}
    head_width = fresh_longer().layers[0].rotation.head_width
    assert turned["first layer turns"] == [Rotation(head_width).num_turned] * 2
    assert turned["all pairs turn"] == turned[UNDO[-1]] == [head_width // 2] * 2
    assert turned["loud numbers"] == [0, Rotation(head_width).num_turned]
    assert models["loud numbers"].state_dict()["embedding.event_numbers.quantity.weight"].abs().max() > 0.5
    assert float(models["quiet items"].embedding.item.embedding.weight.detach().std()) == pytest.approx(0.05, rel=0.02)
    monkeypatch.setattr(Block, "make_search", lambda *_: None)
    never_marked = fresh_longer().layers[0].key_value.weight[width:]
    torch.testing.assert_close(models["values without the mark"].layers[0].key_value.weight[width:], never_marked)


def test_counted_flops_are_those_of_the_arm_at_its_longest_history(generated: Log) -> None:
    counted, ends = {}, generated.requests["test"].history_end_R
    num_candidates = round(float(np.diff(generated.requests["test"].candidates.offsets_R1).mean()))
    for name, merge, length in (
        ("longer", 4, 320),
        ("longer", 1, 320),
        ("longer", 4, 160),
        (ITSELF, 4, 320),
        ("din", 1, 320),
    ):
        arm = Arm(name, "generated", "encoders", 0, encoder=name, features=False, merge=merge, length=length)
        settings = model_settings(arm, TINY)
        found = training._forward_flops(generated, arm, settings)
        counted[name, merge, length] = found["flops"]
        assert ends.min() < length < ends.max()  # or any request could stand for the longest
        assert settings.history_events - merge < found["events"] <= settings.windows.max_history_events
        assert found["candidates"] == num_candidates
        if name == "longer":
            groups, width = int(found["events"]) // merge, settings.width
            heads = num_candidates * (4 * width**2 + 4 * width)
            formula = longer_flops(settings, groups, TINY.num_queries, num_candidates) + heads
            assert found["flops"] == pytest.approx(formula, rel=0.1)
    assert counted[ITSELF, 4, 320] < counted["longer", 4, 160] < counted["longer", 4, 320] < counted["longer", 1, 320]
    assert counted[ITSELF, 4, 320] < counted["din", 1, 320]
