"""What an offline run compares with the serving path, and what of it its manifest tells."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from longer.config import Settings
from longer.data.scores import MAX_DIFFERENCE, relative_gaps
from longer.errors import UserError
from longer.model_settings import ModelSettings
from longer.serving import batch
from longer.serving.batch import batch_score, export_vectors, spooled_buckets
from longer.serving.batch_check import OnlineCheck, chosen_numbers, compare, num_left_out
from longer.serving.batch_input import Chunk
from longer.serving.batch_output import Run, remember_bucket
from longer.serving.batch_plan import Plan, check_model, plan_scores, plan_vectors
from longer.serving.batch_scorer import BucketScorer
from longer.serving.batch_totals import actors_of, totals_of
from longer.storage import Table
from longer.training_settings import TaskSettings
from tests.serving.batch_runs import asking, expected_scores, ids_file, score_here, world_with_requests, written_here
from tests.serving.tables import (
    MODEL,
    NUM_ITEMS,
    NUM_USERS,
    build_world,
    publish_model,
    publish_random_model,
    random_model,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return world_with_requests(tmp_path_factory.mktemp("check"))


def comparing(
    scorer: BucketScorer, numbers: np.ndarray, plan: Plan | None = None, most_candidates: int = 4096, **chosen: int
) -> Callable[[Chunk, pa.Table], OnlineCheck]:
    """Compares requests `numbers` of a chunk's rows with what the serving path of this actor says."""

    def compared(chunk: Chunk, rows: pa.Table) -> OnlineCheck:
        items = scorer._answers.items
        check = OnlineCheck(plan or scorer._plan, scorer._scorer, items, numbers, most_candidates, (1,), **chosen)
        check.see(chunk, rows)
        compare([check])
        return check

    return compared


def test_a_request_that_was_to_be_compared_and_never_came_fails_the_run(world: Settings, tmp_path: Path) -> None:
    scorer = BucketScorer(plan_scores(world), Run(str(tmp_path)))
    chunk = next(iter(scorer._reader.bucket(0)[1]))
    rows = scorer._answers.rows(chunk)
    with pytest.raises(ArithmeticError, match="2 requests were to be compared, 1 of them were met"):
        comparing(scorer, np.array([0, len(rows)]))(chunk, rows)


def test_all_that_is_compared_of_a_bucket_is_one_batch_of_the_serving_path(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or as few as the bound on candidates allows; in either case all of it is compared."""
    plan, run = plan_scores(asking(world, catalogue=True, top_k=2)), Run(str(tmp_path))
    spooled_buckets(plan, run)
    scorer = BucketScorer(plan, run)
    assert scorer._scorer
    asked, score = [], scorer._scorer.score
    monkeypatch.setattr(scorer._scorer, "score", lambda requests: (asked.append(requests), score(requests))[1])
    [chunk] = scorer._reader.bucket(1)[1]
    rows = scorer._answers.rows(chunk)
    assert len(rows) > 1
    numbers = np.arange(len(rows))
    for most, num_batches in ((10_000, 1), (len(rows) * NUM_ITEMS // 2, 3)):
        asked.clear()
        check = comparing(scorer, numbers, most_candidates=most, num_left_out=NUM_ITEMS)(chunk, rows)
        assert check.num_compared == len(rows)
        assert len(asked) <= num_batches
        assert sum(len(request.item_ids) for requests in asked for request in requests) == len(rows) * NUM_ITEMS


def test_no_part_of_a_bucket_or_of_a_long_list_is_never_looked_at() -> None:
    """In one version after the other; the last row in each, where files and lists are cut off."""
    seen = np.zeros(1000, int)
    for version in range(400):
        numbers = chosen_numbers(1000, 4, (version, 7))
        np.testing.assert_array_equal(numbers, chosen_numbers(1000, 4, (version, 7)))
        assert len(set(numbers.tolist())) == 4
        seen[numbers] += 1
    assert seen[-1] == 400
    assert seen.reshape(10, 100)[:, :99].sum(axis=1).min() > 60, "a tenth of the rows is hardly looked at"
    assert len({int(chosen_numbers(1000, 1, (version,))[0]) for version in range(20)}) > 10
    np.testing.assert_array_equal(chosen_numbers(3, 4, (0,)), [0, 1, 2])


def test_a_score_that_the_serving_path_does_not_give_fails_the_run(world: Settings, tmp_path: Path) -> None:
    for settings in (world, asking(world, catalogue=True, top_k=3)):
        scorer = BucketScorer(plan_scores(settings), Run(str(tmp_path)))
        chunk = next(iter(scorer._reader.bucket(0)[1]))
        rows = scorer._answers.rows(chunk)
        compared = comparing(scorer, np.array([0]))
        assert compared(chunk, rows).num_compared == 1
        scores = pa.chunked_array([[[score + 2e-5 for score in row] for row in rows["score_label"].to_pylist()]])
        wrong = rows.set_column(rows.column_names.index("score_label"), "score_label", scores)
        with pytest.raises(ArithmeticError, match="between the offline and the serving path"):
            compared(chunk, wrong)
    worst_kept = rows["item_id"].to_pylist()[0][::-1]
    expected = expected_scores(world, [chunk.user_id_R[0].as_py()], worst_kept, int(chunk.questions.request_ts_R[0]))
    assert (np.diff(expected[0]) > 0).all()
    only_last = rows.slice(0, 1)
    for name in ("item_id", "score_label"):
        kept = pa.chunked_array([[rows[name][0].as_py()[-1:]]], rows[name].type)
        only_last = only_last.set_column(rows.column_names.index(name), name, kept)
    with pytest.raises(ArithmeticError):  # two items that score higher are left out
        compared(chunk, only_last)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_scores_of_rare_clicks_are_told_from_a_constant_from_others_and_from_the_worst(
    tmp_path: Path, precision: str
) -> None:
    """Probabilities of a quarter of a percent: all are alike where the scale is that of probabilities."""
    world = world_with_requests(tmp_path / "world")
    model = random_model(world, 0)
    head = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part.out_features == 1][-1]
    with torch.no_grad():
        head.bias -= 6.0
        head.weight *= 0.5
    publish_model(world, model, "rare")
    plan = replace(plan_scores(asking(world, catalogue=True, top_k=NUM_ITEMS)), precision=precision)
    scorer = BucketScorer(plan, Run(str(tmp_path)))
    chunk = next(iter(scorer._reader.bucket(0)[1]))
    rows = scorer._answers.rows(chunk)
    scores = np.array(rows["score_label"].to_pylist())
    assert scores.max() < 0.005

    def see(top_k: int, **changed: list) -> None:
        wrong = rows
        for name, values in changed.items():
            wrong = wrong.set_column(rows.column_names.index(name), name, pa.array(values, rows[name].type))
        numbers = np.arange(len(rows))
        comparing(scorer, numbers, replace(plan, top_k=top_k), num_left_out=NUM_ITEMS)(chunk, wrong)

    see(NUM_ITEMS)
    for wrong in (np.full_like(scores, scores.mean()), 2 * scores):
        with pytest.raises(ArithmeticError, match="of the size of their log-odds"):
            see(NUM_ITEMS, score_label=list(wrong))
    best, worst = ({name: [row[part] for row in rows[name].to_pylist()] for name in ("item_id", "score_label")}
                   for part in (slice(3), slice(-1, -4, -1)))  # fmt: skip
    see(3, **best)
    with pytest.raises(ArithmeticError, match="of the size of their log-odds"):
        see(3, **worst)


def test_a_small_regression_and_a_probability_near_one_are_compared_on_scales_of_their_own() -> None:
    small = np.array([1e-3, -2e-3, 3e-3], np.float32)
    assert relative_gaps(small, small * np.float32(1 + 4e-6), "regression").max() < MAX_DIFFERENCE
    assert relative_gaps(small, small * np.float32(1 + 4e-5), "regression").max() > MAX_DIFFERENCE
    near_1 = np.array([1 - 2e-4, 0.3, 0.0, 1.0], np.float32)
    rounded = np.nextafter(near_1, np.float32(0.5))
    assert relative_gaps(near_1, rounded, "binary").max() < MAX_DIFFERENCE
    other = np.array([1 - 3e-4, 0.3, 0.0, 1.0], np.float32)
    assert relative_gaps(near_1, other, "binary").argmax() == 0
    assert relative_gaps(near_1, other, "binary").max() > MAX_DIFFERENCE
    assert relative_gaps(near_1, np.where(near_1 == 1, np.nan, near_1), "binary").max() == np.inf


def test_a_block_lost_from_a_large_catalogue_is_met_by_the_items_drawn(world: Settings, tmp_path: Path) -> None:
    """The 30 best of 30,000 items, lost for a user: how likely that is seen does not depend on the catalogue's size."""
    strangers = ids_file(tmp_path, item_id=[f"stranger{i}" for i in range(32_000)])
    run = Run(str(tmp_path / "scores"))
    plan = plan_scores(asking(world, candidates=strangers))
    spooled_buckets(plan, run)
    scorer = BucketScorer(plan, run)
    chunk = next(iter(scorer._reader.bucket(1)[1]))
    one = scorer._answers.rows(chunk).slice(0, 1)
    ids, scores = (np.array(one[name][0].as_py()) for name in ("item_id", "score_label"))
    best, others = ids[scores == scores.max()][:30], ids[scores < scores.max()][: 30_000 - 30]
    assert len(best) + len(others) == 30_000
    plan = plan_scores(asking(world, candidates=ids_file(tmp_path, item_id=[*best, *others]), top_k=100))
    spooled_buckets(plan, run)
    scorer = BucketScorer(plan, run)
    rows = scorer._answers.rows(chunk).slice(0, 1)
    assert set(rows["item_id"][0].as_py()[:30]) == set(best)
    for name in ("item_id", "score_label"):
        kept = pa.chunked_array([[rows[name][0].as_py()[30:]]], rows[name].type)
        rows = rows.set_column(rows.column_names.index(name), name, kept)
    drawn = num_left_out(40, 30_000, 1)
    assert drawn == 12_000
    assert num_left_out(40, 10**6, 4) == 10**5
    assert num_left_out(4, 100, 4) == 100
    with pytest.raises(ArithmeticError, match="scores of label differ"):
        comparing(scorer, np.zeros(1, np.int64), num_left_out=drawn)(chunk, rows)


def test_a_regression_head_of_any_scale_is_compared_relative_to_it(tmp_path: Path) -> None:
    world = build_world(tmp_path / "world")
    tasks = (TaskSettings(name="label"), TaskSettings(name="watch_ms", kind="regression"))
    world = world.model_copy(update={"train": world.train.model_copy(update={"tasks": tasks})})
    model = random_model(world, 1)
    head = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part.out_features == 2][-1]
    with torch.no_grad():
        head.weight[1] *= 1000
        head.bias[1] *= 1000
    publish_model(world, model, "large")
    candidates = ids_file(tmp_path, item_id=[f"item{i}" for i in range(NUM_ITEMS)])
    for top_k in (None, 3):
        asked = asking(world, candidates=candidates, top_k=top_k, check_requests=NUM_USERS)
        rows = written_here(plan_scores(asked), tmp_path / f"{top_k}")
        values = np.array(rows["score_watch_ms"].to_pylist())
        assert np.abs(values).max() > 300
    plan, run = plan_scores(asked), Run(str(tmp_path / "again"))
    spooled_buckets(plan, run)
    scorer = BucketScorer(plan, run)
    chunk = next(iter(scorer._reader.bucket(1)[1]))
    rows = scorer._answers.rows(chunk)
    wrong = pa.array(
        [[score * 1.0001 for score in row] for row in rows["score_watch_ms"].to_pylist()], rows["score_watch_ms"].type
    )
    column = rows.column_names.index("score_watch_ms")
    with pytest.raises(ArithmeticError, match="scores of watch_ms differ by"):
        comparing(scorer, np.arange(len(rows)))(chunk, rows.set_column(column, "score_watch_ms", wrong))


def test_a_vector_that_the_serving_path_does_not_give_fails_the_run(world: Settings, tmp_path: Path) -> None:
    scorer = BucketScorer(plan_vectors(world), Run(str(tmp_path)))
    chunk = next(iter(scorer._reader.bucket(1)[1]))
    rows = scorer._answers.rows(chunk)
    compared = comparing(scorer, np.arange(len(rows)))
    check = compared(chunk, rows)
    assert check.num_compared == len(rows) > 1
    assert 0 < check.max_abs_diff <= 1e-5
    vectors = np.array(rows["vector"].to_pylist(), np.float32)
    of_another_user, broken = np.roll(vectors, 1, axis=0), np.where(np.arange(vectors.shape[1]) == 3, np.nan, vectors)
    for wrong in (of_another_user, broken, vectors * 1.001):
        column = pa.chunked_array([pa.array(list(wrong))])
        with pytest.raises(ArithmeticError, match="between the offline and the serving path"):
            compared(chunk, rows.set_column(rows.column_names.index("vector"), "vector", column))


@pytest.mark.parametrize("encoding", ["paper", "appendable"])
def test_a_run_of_which_nothing_was_compared_says_so_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    """A model without user states, whose last line said as much as that of one that had passed."""
    monkeypatch.setattr(batch, "_score_buckets", score_here)
    world = world_with_requests(tmp_path, model={**MODEL, "encoding": encoding})
    check = batch_score(world).manifest["online_check"]
    told = capsys.readouterr().err.splitlines()[-1]
    if encoding == "appendable":
        assert check["requests"] > 0
        assert "nothing" not in told
        return
    assert (check["requests"], check["max_abs_diff"]) == (0, None)
    assert check["nothing_because"].startswith("this model keeps no user states")
    assert told.endswith(f"; nothing compared with the serving path: {check['nothing_because']}")


def test_a_finished_run_says_that_it_was_checked_less_than_is_asked_and_on_what_it_ran(
    world: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch, "_score_buckets", score_here)
    chosen = {"catalogue": True, "top_k": 2, "check_requests": 2}
    plan = plan_scores(asking(world, **chosen))
    [gpu] = BucketScorer(plan, Run(Table(plan.table_path).resume(plan.version_id))).write_bucket(0)
    remember_bucket(f"{plan.table_path}/{plan.version_id}", gpu | {"device": "cuda", "device_s": 100.0})
    version = batch_score(asking(world, **chosen))
    assert version.manifest["device"] == "cpu+cuda"
    assert 100 < version.manifest["device_s"] < 150
    assert "CPU+GPU-s a million" in capsys.readouterr().err
    assert batch_score(asking(world, **chosen | {"check_requests": 1})) == version
    assert "compared" not in capsys.readouterr().err
    assert batch_score(asking(world, **chosen | {"check_requests": 3})) == version
    assert "2 requests of each bucket compared: for 3, remove" in capsys.readouterr().err


def test_actors_of_one_host_and_process_number_are_told_apart(world: Settings, tmp_path: Path) -> None:
    """As in containers that are started anew: all have one name, and a process number that is the same each time."""
    scorers = [BucketScorer(plan_scores(world), Run(str(tmp_path))) for _ in range(2)]
    records = [record for bucket, scorer in enumerate(scorers) for record in scorer.write_bucket(bucket)]
    starts = [record["actor"]["device_s"] for record in records]
    assert totals_of(records)["start_device_s"] == pytest.approx(sum(starts))
    assert [actor["buckets"] for actor in actors_of(records, 0.0)] == [1, 1]


@pytest.mark.parametrize(
    ("part", "why"),
    [("num_self_layers", "the user's token of such a model is never"), ("num_user_tokens", "no token of a user")],
)
def test_the_checkpoint_not_the_settings_says_whether_there_are_vectors(tmp_path: Path, part: str, why: str) -> None:
    world = build_world(tmp_path)
    without = world.model_copy(update={"model": ModelSettings(**{**MODEL, part: 0})})
    check_model(plan_vectors(without))
    publish_random_model(without, seed=1)
    with pytest.raises(UserError, match=rf"model\.json: model\.{part}=0: .*{why}"):
        export_vectors(world)


def test_weights_that_are_not_finite_are_one_line(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    publish_random_model(world, seed=1, scale=np.nan)
    for run in (export_vectors, lambda settings: batch_score(asking(settings, catalogue=True, top_k=1))):
        with pytest.raises(UserError, match=r"model\.safetensors: weights that are not finite: train again"):
            run(world)


def test_a_run_that_finds_all_buckets_done_tells_no_rate_and_what_the_start_of_actors_cost(
    world: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch, "_score_buckets", score_here)
    asked = asking(world, catalogue=True, top_k=4)
    with monkeypatch.context() as killed:
        killed.setattr(batch, "totals_of", _killed)
        with pytest.raises(KeyboardInterrupt):
            batch_score(asked)
    told = batch_score(asked).manifest
    assert told["num_rows"] == NUM_USERS * NUM_ITEMS
    assert told["num_rows_of_this_run"] == told["num_users_of_this_run"] == 0
    assert told["rows_per_s"] is None
    assert told["users_per_s"] is None
    assert 0 < told["start_device_s"] < told["device_s"]
    assert 0 < told["start_cpu_s"] < told["cpu_s"]
    assert told["steady_device_s_per_million_scores"] < told["device_s_per_million_scores"]
    said = capsys.readouterr().err
    assert "108 scores, 0 of them by this run, " in said
    assert "a second" not in said
    assert re.search(r"CPU-s a million scores, \S+ with the start of actors", said)


def _killed(_: object) -> None:
    raise KeyboardInterrupt
