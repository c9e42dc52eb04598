"""Batch scores are the scorer's; an interrupted run goes on, a finished one is found."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import batch_score
from longer.config import Settings
from longer.data.scores import check_difference, max_abs_diff, score_rows
from longer.data.tables import RequestTable, SequenceTable
from longer.errors import UserError
from longer.serving.batch import batch_score as score_split
from longer.serving.batch_output import Run, done_buckets
from longer.serving.batch_plan import plan_scores
from longer.serving.batch_scorer import BucketScorer
from longer.serving.check import choose_requests
from longer.serving.scorer import Scorer, ScoreRequest, ScoreResult
from longer.storage import Table, Version, checked_output
from longer.training.inputs import Inputs
from longer.training.loader import concat_requests, read_split
from longer.training_settings import TaskSettings
from tests.serving.tables import build_world, checkpoint_path, publish_requests


def checksums(version: Version) -> dict[str, str]:
    """By bucket: each run names its own files."""
    return {file.path.partition("/")[0]: file.sha256 for file in version.data_files()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = build_world(tmp_path_factory.mktemp("batch"))
    publish_requests(settings, Table(settings.path("tables", "sequences")).require("jobs.build_sequences"))
    return settings


def online_scores(world: Settings) -> pa.Table:
    """Every test request through one cached scorer, candidates by id, as a score table."""
    requests = RequestTable(world.path("tables", "requests"), world.event_schema)
    asked = concat_requests(choose_requests(requests, "test", 10**6))
    sequences, items = world.path("tables", "sequences"), world.path("tables", "items")
    scorer = Scorer(checkpoint_path(world), sequences, 1 << 30, items)
    offsets, ids = asked.candidates.offsets_R1, asked.item_id_C.to_pylist()
    scores = []
    for r in range(len(asked)):
        candidates, ts = ids[offsets[r] : offsets[r + 1]], int(asked.request_ts_R[r])
        [result] = scorer.score([ScoreRequest(asked.user_id_R[r].as_py(), candidates, request_ts=ts)])
        assert isinstance(result, ScoreResult)
        assert result.num_events == asked.history_end_R[r]
        scores.append(result.scores["label"])
    assert scorer.cache.counters.append > 0
    return score_rows(asked, {"label": np.concatenate(scores)}, world.event_schema)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_batch_scores_equal_online_ones_and_a_rerun_finds_them(
    world: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    online = online_scores(world)
    table = Table(world.path("serving_check"))
    with checked_output(table.begin("online"), "scores/part-0.parquet") as sink:
        pa.parquet.write_table(online, sink)
    inputs = Inputs.served(world)
    table.publish("online", {"inputs": inputs.ids}, [sink.data_file])

    record = batch_score.run(world).manifest
    assert record["compared_requests"] == len(online) == inputs.requests.manifest["num_requests"]["test"]
    assert record["max_abs_diff_vs_online"] <= 1e-5
    assert record["rows"] == len(online["item_id"].combine_chunks().flatten())
    assert record["rows_per_s"] > 0
    scored = Table(world.path("batch_scores")).require("jobs.batch_score")
    assert scored.manifest["inputs"] == inputs.ids
    assert scored.manifest["online_check"]["requests"] > 0
    assert 0 < scored.manifest["online_check"]["max_abs_diff"] <= 1e-5
    assert scored.manifest["model_version"] == inputs.checkpoint.manifest["model_version"]
    actors = scored.manifest["actors"]
    assert sum(actor["scores"] for actor in actors) == scored.manifest["num_rows"]
    assert all(sum(actor["stages_s"].values()) <= actor["buckets_s"] for actor in actors), "no second is told twice"
    assert all({"read", "encode", "score", "check", "write"} <= actor["stages_s"].keys() for actor in actors)

    capsys.readouterr()
    assert score_split(world) == scored
    assert "already there, nothing changed" in capsys.readouterr().err

    damaged = Path(scored.files()[0])
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    again = score_split(world)
    assert checksums(again) == checksums(scored)
    assert not damaged.exists(), "a file that the version does not name"
    assert again.is_whole()


def test_a_bucket_written_twice_is_the_same_bytes(world: Settings, tmp_path: Path) -> None:
    scorer = BucketScorer(plan_scores(world), Run(str(tmp_path)))
    [written] = scorer.write_bucket(0)
    assert written["num_scores"] > 0
    assert done_buckets(str(tmp_path)) == {0: written}
    before = (tmp_path / written["file"]["path"]).read_bytes()
    assert scorer.write_bucket(0)[0]["file"] == written["file"]
    assert (tmp_path / written["file"]["path"]).read_bytes() == before
    (tmp_path / written["file"]["path"]).write_bytes(before[:-1])
    assert done_buckets(str(tmp_path)) == {}, "a damaged file counts as done"


def test_windows_that_reach_before_the_table_are_refused_not_filled_with_another_users_events(world: Settings) -> None:
    sequences = SequenceTable(world.path("tables", "sequences"), world.event_schema)
    requests = RequestTable(world.path("tables", "requests"), world.event_schema)
    buckets = range(requests.num_buckets)
    longer_windows = replace(world.model.windows, history_groups=4 * world.model.windows.history_groups)
    with pytest.raises(
        UserError, match=r"model.history_events=\d+: the history windows of \d+ test requests start before"
    ):
        read_split(sequences, requests, "test", longer_windows, buckets)
    _, histories = sequences.read_bucket(0)
    for start, end in (
        (histories.first_index_B - 1, histories.end_index_B),
        (histories.first_index_B, histories.end_index_B + 1),
    ):
        with pytest.raises(IndexError, match="another user's would be read"):
            histories.slice_events(np.arange(len(histories)), start, end)


def test_a_split_without_requests_is_named(world: Settings) -> None:
    other = world.model_copy(update={"batch_score": world.batch_score.model_copy(update={"split": "tset"})})
    with pytest.raises(UserError, match=r"batch_score\.split=tset: .* choose one of train, valid, test"):
        score_split(other)


def test_a_difference_in_one_score_is_seen_and_other_candidates_are_refused(world: Settings) -> None:
    asked = concat_requests(
        choose_requests(RequestTable(world.path("tables", "requests"), world.event_schema), "test", 5)
    )
    scores = np.zeros(len(asked.item_id_C), np.float32)
    zeros = score_rows(asked, {"label": scores.copy()}, world.event_schema)
    scores[-1] = 0.25
    changed = score_rows(asked, {"label": scores}, world.event_schema)
    assert max_abs_diff(zeros, changed.take(pa.array(range(len(asked))[::-1])), world.train.tasks) == (0.25, 5)
    assert max_abs_diff(zeros, changed.slice(0, 2), world.train.tasks)[1] == 2
    scores[-1] = np.nan
    broken = score_rows(asked, {"label": scores}, world.event_schema)
    assert max_abs_diff(zeros, broken, world.train.tasks)[0] == np.inf
    for other in (changed, broken):
        with pytest.raises(ArithmeticError, match=r"scores of label differ by (2\.5e-01|inf) between two paths"):
            check_difference(zeros, other, world.train.tasks)
    large = score_rows(asked, {"label": np.full(len(scores), 3e4, np.float32)}, world.event_schema)
    for gap, is_rounding in ((0.2, True), (0.5, False)):  # of regression values: one is 7e-6 of them, one 2e-5
        scores[:] = 3e4
        scores[-1] += gap
        other, tasks = score_rows(asked, {"label": scores}, world.event_schema), [TaskSettings(kind="regression")]
        if is_rounding:
            assert check_difference(large, other, tasks)[0] > 0.1
        else:
            with pytest.raises(ArithmeticError, match=r"by 1.7e-05 of the size of them, more than 1e-05"):
                check_difference(large, other, tasks)
    items = pa.array([["x"]] * len(asked), pa.list_(pa.string()))
    with pytest.raises(ValueError, match="other candidates"):
        max_abs_diff(zeros, changed.set_column(3, "item_id", items), world.train.tasks)
