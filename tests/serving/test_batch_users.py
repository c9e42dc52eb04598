"""Users times candidates, users' best items, users' vectors: what is published is what the model says of each user."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from longer.arrays import Candidates, Histories
from longer.batch_settings import BatchSettings, ExportSettings
from longer.config import ModelSettings, Settings, TaskSettings
from longer.data.columns import read_columns
from longer.data.id_lists import IdList
from longer.data.items import ItemTable, items_version
from longer.data.records import Record
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.hashing import stable_keys
from longer.model.longer import Longer
from longer.model.ranker import Ranker
from longer.model.sweep import Sweep
from longer.serving import batch, batch_input
from longer.serving.batch import BucketScorer, batch_score, export_vectors, spooled_buckets
from longer.serving.batch_check import OnlineCheck, num_left_out
from longer.serving.batch_output import Run, remember_bucket
from longer.serving.batch_plan import Plan, check_model, plan_scores, plan_vectors
from longer.serving.offline import Questions
from longer.storage import Table, Version, checksum, file_sizes, write_bytes
from longer.training.checkpoints import load_model
from tests.serving.tables import (
    DAY_MS,
    MODEL,
    NUM_BUCKETS,
    NUM_ITEMS,
    NUM_USERS,
    START_MS,
    build_world,
    checkpoint_path,
    publish_model,
    publish_random_model,
    publish_requests,
    random_model,
)
from tests.serving.test_offline import forward

MIDDAY = "2023-12-11T12:00:00Z"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = build_world(tmp_path_factory.mktemp("users"))
    publish_requests(settings, Table(settings.path("tables", "sequences")).require("jobs.build_sequences"))
    return settings


def asking(world: Settings, **chosen: object) -> Settings:
    return world.model_copy(update={"batch_score": BatchSettings(**chosen)})


def ids_file(folder: Path, **column: list | pa.Array) -> str:
    path = folder / f"{next(iter(column))}.parquet"
    pq.write_table(pa.table(column), path)
    return str(path)


def rows_of(version: Version) -> pa.Table:
    return pa.concat_tables([read_columns(file) for file in version.files()]).sort_by("user_id")


def written_here(plan: Plan, folder: Path) -> pa.Table:
    """The rows of all buckets, written in this process, without Ray."""
    run = Run(str(folder))
    buckets = spooled_buckets(plan, run)
    scorer = BucketScorer(plan, run)
    files = [scorer.write_bucket(bucket)["file"]["path"] for bucket in buckets]
    return pa.concat_tables([read_columns(f"{folder}/{file}") for file in files]).sort_by("user_id")


def score_here(plan: Plan, _pool: object, _where: object, run: Run, buckets: list[int], _job: str) -> list[Record]:
    """In the place of Ray's actors."""
    scorer = BucketScorer(plan, run)
    return [scorer.write_bucket(bucket) for bucket in buckets]


def questions_of(world: Settings, users: list[int], request_ts: int) -> Questions:
    histories = SequenceTable(world.path("tables", "sequences"), world.event_schema).get(users)
    ends = [
        int(first + (histories.event_ts_E[begin:end] < request_ts).sum())
        for first, begin, end in zip(
            histories.first_index_B, histories.offsets_B1[:-1], histories.offsets_B1[1:], strict=True
        )
    ]
    return Questions(histories, np.arange(len(users)), np.array(ends), np.full(len(users), request_ts))


def vector_of(model: Ranker, histories: Histories, row: int, history_end: int) -> np.ndarray:
    """[1, D]: one user's vector of a sweep of its own."""
    assert isinstance(model, Longer)
    end = np.array([history_end])
    start = model.windows.history_start(end) * model.windows.merge_size
    sweep = Sweep(model, histories.slice_events(np.array([row]), start, end))
    sweep.advance(end)
    return sweep.ask(np.zeros(1, np.int64), end, np.zeros(1, np.int64)).user_vectors_RD.numpy()


def expected_scores(world: Settings, users: list[int], items: list[str], request_ts: int) -> np.ndarray:
    """[users, items] of the training forward pass, item features from the catalogue."""
    model, _ = load_model(checkpoint_path(world))
    keys, schema = stable_keys(pa.array(items * len(users))), world.event_schema
    sequences = Table(world.path("tables", "sequences")).require("jobs.build_sequences").id
    features = ItemTable(world.path("tables", "items"), schema, items_version(sequences, schema)).lookup(keys)
    candidates = Candidates(np.arange(len(users) + 1) * len(items), {"item_id": keys, **features})
    outputs = forward(model, questions_of(world, users, request_ts), candidates)[:, 0]
    return torch.from_numpy(outputs).sigmoid().numpy().reshape(len(users), len(items))


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_every_user_meets_every_candidate_once_strangers_included(world: Settings, tmp_path: Path) -> None:
    users = ids_file(tmp_path, user_id=[5, 3, 5, 777, 9])
    candidates = ids_file(tmp_path, item_id=["item4", "nowhere", "item0", "item4"])
    asked = asking(world, users=users, candidates=candidates, request_ts=MIDDAY)
    version = batch_score(asked)
    rows = rows_of(version)
    assert rows["user_id"].to_pylist() == [3, 5, 9, 777]
    assert rows["item_id"].to_pylist() == [["item4", "nowhere", "item0"]] * 4
    moment = rows["request_ts"].cast(pa.int64())[0].as_py()
    assert moment == START_MS + (moment - START_MS) // DAY_MS * DAY_MS + DAY_MS // 2
    expected = expected_scores(world, [3, 5, 9, 777], ["item4", "nowhere", "item0"], moment)
    np.testing.assert_allclose(np.array(rows["score_label"].to_pylist()), expected, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 0.01, "users are not told apart"
    assert version.manifest["num_rows"] == 12
    assert version.manifest["online_check"]["requests"] == 4
    assert version.manifest["online_check"]["max_abs_diff"] <= 1e-5
    assert version.manifest["device_s_per_million_scores"] > 0
    assert not Path(version.path, "_scratch").exists()
    assert batch_score(asked) == version
    other = ids_file(tmp_path, user_id=[5, 3])
    assert batch_score(asking(world, users=other, candidates=candidates, request_ts=MIDDAY)).id != version.id


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_best_of_the_catalogue_for_all_users_after_their_last_event(world: Settings) -> None:
    version = batch_score(asking(world, catalogue=True, top_k=5))
    rows = rows_of(version)
    everyone, items = list(range(1, NUM_USERS + 1)), [f"item{i}" for i in range(NUM_ITEMS)]
    assert rows["user_id"].to_pylist() == everyone
    watermark = SequenceTable(world.path("tables", "sequences"), world.event_schema).version.manifest["watermark"]
    moment = int(np.datetime64(watermark.removesuffix("+00:00"), "ms").astype(np.int64)) + 1
    expected = expected_scores(world, everyone, items, moment)
    for user, row in enumerate(rows.to_pylist()):
        best = np.argsort(-expected[user], kind="stable")[:5]
        np.testing.assert_allclose(row["score_label"], expected[user][best], atol=1e-5)
        np.testing.assert_allclose(
            expected[user][[items.index(i) for i in row["item_id"]]], row["score_label"], atol=1e-5
        )
    assert version.manifest["num_rows"] == NUM_USERS * NUM_ITEMS


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_vectors_are_the_users_own_tokens_at_the_moment(world: Settings) -> None:
    exported = export_vectors(world.model_copy(update={"export_embeddings": ExportSettings(request_ts=MIDDAY)}))
    rows, model = rows_of(exported), load_model(checkpoint_path(world))[0]
    everyone = list(range(1, NUM_USERS + 1))
    assert rows["user_id"].to_pylist() == everyone
    questions = questions_of(world, everyone, int(rows["request_ts"].cast(pa.int64())[0].as_py()))
    assert rows["num_events"].to_pylist() == questions.history_end_R.tolist()
    assert exported.manifest["online_check"]["requests"] > NUM_BUCKETS
    assert exported.manifest["online_check"]["max_abs_diff"] <= 1e-5
    vectors = np.array(rows["vector"].to_pylist(), np.float32)
    for user, end in enumerate(questions.history_end_R.tolist()):
        expected = vector_of(model, questions.histories, user, end)
        np.testing.assert_allclose(vectors[user : user + 1], expected, rtol=1e-5, atol=1e-5)


def test_files_replaced_under_a_run_never_become_its_answers(world: Settings, tmp_path: Path) -> None:
    users, candidates = ids_file(tmp_path, user_id=[5, 3]), ids_file(tmp_path, item_id=["item1", "item2"])
    plan, run = plan_scores(asking(world, users=users, candidates=candidates)), Run(str(tmp_path / "version"))
    buckets = spooled_buckets(plan, run)
    ids_file(tmp_path, user_id=[9]), ids_file(tmp_path, item_id=["item7"])  # a nightly export lands here
    files = [BucketScorer(plan, run).write_bucket(bucket)["file"]["path"] for bucket in buckets]
    rows = pa.concat_tables([read_columns(f"{run.version_path}/{file}") for file in files])
    assert sorted(rows["user_id"].to_pylist()) == [3, 5]
    assert rows["item_id"].to_pylist() == [["item1", "item2"]] * 2
    with pytest.raises(UserError, match=r"batch_score\.candidates=\S+: changed while this run read it"):
        spooled_buckets(plan, Run(str(tmp_path / "version")))
    ids_file(tmp_path, item_id=["item1", "item2"])
    with pytest.raises(UserError, match=r"batch_score\.users=\S+: changed while this run read it"):
        spooled_buckets(plan, Run(str(tmp_path / "version")))


def test_ids_of_other_files_are_other_inputs_however_they_are_cut(tmp_path: Path) -> None:
    def digest(*files: list[str]) -> str:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for number, ids in enumerate(files):
            pq.write_table(pa.table({"item_id": ids}), folder / f"{number}.parquet")
        return IdList(str(folder), "item_id", pa.string(), "batch_score.candidates").digest()

    assert digest(["a", "b", "c"]) == digest(["a"], ["b", "c"])
    assert len({digest(["a", "b"]), digest(["b", "a"]), digest(["a"]), digest(["a", "b", "b"])}) == 4


def test_an_event_at_the_very_moment_of_the_request_is_not_seen(world: Settings, tmp_path: Path) -> None:
    """The time of a user's last but two events: a state that held it would tell the future."""
    histories = SequenceTable(world.path("tables", "sequences"), world.event_schema).get([7])
    moment, items = int(histories.event_ts_E[-3]), ["item1", "item2", "item3"]
    seen = int((histories.event_ts_E < moment).sum()) + int(histories.first_index_B[0])
    chosen = {"users": ids_file(tmp_path, user_id=[7]), "request_ts": datetime.fromtimestamp(moment / 1000, UTC)}
    asked = asking(world, candidates=ids_file(tmp_path, item_id=items), **chosen)
    rows = written_here(plan_scores(asked), tmp_path / "scores")
    expected, told = (expected_scores(world, [7], items, ts) for ts in (moment, moment + 1))
    assert np.abs(expected - told).max() > 1e-3, "the event makes no difference"
    np.testing.assert_allclose(rows["score_label"].to_pylist(), expected, atol=1e-5)
    exported = world.model_copy(update={"export_embeddings": ExportSettings(**chosen)})
    rows = written_here(plan_vectors(exported), tmp_path / "vectors")
    assert rows["num_events"].to_pylist() == [seen]
    model, _ = load_model(checkpoint_path(world))
    np.testing.assert_allclose(rows["vector"].to_pylist(), vector_of(model, histories, 0, seen), rtol=1e-5, atol=1e-5)


def test_chunks_cut_anywhere_give_the_same_rows(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = BucketScorer(plan_scores(world), Run(str(tmp_path / "whole"))).write_bucket(1)
    monkeypatch.setattr(batch_input, "_CHUNK_REQUESTS", 3)
    monkeypatch.setattr(batch_input, "_CHUNK_EVENTS", 10)
    cut = BucketScorer(plan_scores(world), Run(str(tmp_path / "cut"))).write_bucket(1)
    written = {"whole": whole, "cut": cut}.items()
    rows = [read_columns(f"{tmp_path}/{name}/{record['file']['path']}") for name, record in written]
    same = [name for name in rows[0].column_names if name != "score_label"]
    assert rows[0].select(same).equals(rows[1].select(same))
    scores = [part["score_label"].combine_chunks().flatten().to_numpy() for part in rows]
    np.testing.assert_allclose(*scores, atol=1e-6)
    counts = ("num_requests", "num_users", "num_scores", "num_compared")
    assert [whole[name] for name in counts] == [cut[name] for name in counts]


@pytest.mark.parametrize(
    "chosen", [{"catalogue": True, "top_k": 3}, {"candidates": "candidates"}], ids=["ends", "dies"]
)
def test_the_slower_of_two_runs_on_s3_uses_what_the_faster_has_published(
    chosen: dict, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both write other bytes, since their batches differ. One that reads files of its own finds them gone, and dies of it."""
    local = build_world(tmp_path / "run")
    if "candidates" in chosen:
        chosen = {
            "candidates": ids_file(tmp_path, item_id=["item1", "item2"]),
            "users": ids_file(tmp_path, user_id=list(range(1, NUM_USERS + 1))),
        }
    for file in (tmp_path / "run").rglob("*.*"):
        if file.is_file():
            write_bytes(f"{s3}/run/{file.relative_to(tmp_path / 'run')}", file.read_bytes())
    world = local.model_copy(update={"root": f"{s3}/run"})
    faster = []

    def overtaken(plan: Plan, _pool: object, _where: object, run: Run, buckets: list[int], _job: str) -> list[Record]:
        scorer = BucketScorer(plan, run)
        first = scorer.write_bucket(buckets[0])
        monkeypatch.setattr(batch, "_score_buckets", score_here)
        faster.append(batch_score(asking(world, **chosen, batch_bytes=1 << 20)))
        return [first] + [scorer.write_bucket(bucket) for bucket in buckets[1:]]

    monkeypatch.setattr(batch, "_score_buckets", overtaken)
    slower = batch_score(asking(world, **chosen))
    assert slower == faster[0]
    assert "another run has published it meanwhile" in capsys.readouterr().err
    assert [checksum(slower.path_of(file)) for file in slower.data_files()] == [f.sha256 for f in slower.data_files()]
    assert {f"{slower.path}/{path}" for path in file_sizes(slower.path) if path != "_MANIFEST.json"} == set(
        slower.files()
    )


def test_a_finished_run_says_that_it_was_checked_less_than_is_asked_and_on_what_it_ran(
    world: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch, "_score_buckets", score_here)
    chosen = {"catalogue": True, "top_k": 2, "check_requests": 2}
    plan = plan_scores(asking(world, **chosen))
    gpu = BucketScorer(plan, Run(Table(plan.table_path).resume(plan.version_id))).write_bucket(0)
    remember_bucket(f"{plan.table_path}/{plan.version_id}", gpu | {"device": "cuda", "device_s": 100.0})
    version = batch_score(asking(world, **chosen))
    assert version.manifest["device"] == "cpu+cuda"
    assert 100 < version.manifest["device_s"] < 150
    assert "CPU+GPU-s a million" in capsys.readouterr().err
    assert batch_score(asking(world, **chosen | {"check_requests": 1})) == version
    assert "compared" not in capsys.readouterr().err
    assert batch_score(asking(world, **chosen | {"check_requests": 3})) == version
    assert "2 requests of each bucket compared: for 3, remove" in capsys.readouterr().err


def test_a_score_that_the_serving_path_does_not_give_fails_the_run(world: Settings, tmp_path: Path) -> None:
    for settings in (world, asking(world, catalogue=True, top_k=3)):
        scorer = BucketScorer(plan_scores(settings), Run(str(tmp_path)))
        chunk = next(iter(scorer._reader.chunks(0)))
        rows = scorer._answers.rows(chunk)
        check = OnlineCheck(scorer._plan, scorer._scorer, scorer._answers.items, np.array([0]))
        check.see(chunk, rows)
        assert check.num_compared == 1
        scores = pa.chunked_array([[[score + 2e-5 for score in row] for row in rows["score_label"].to_pylist()]])
        wrong = rows.set_column(rows.column_names.index("score_label"), "score_label", scores)
        with pytest.raises(ArithmeticError, match="between the offline and the serving path"):
            check.see(chunk, wrong)
    worst_kept = rows["item_id"].to_pylist()[0][::-1]
    expected = expected_scores(world, [chunk.user_id_R[0].as_py()], worst_kept, int(chunk.questions.request_ts_R[0]))
    assert (np.diff(expected[0]) > 0).all()
    only_last = rows.slice(0, 1)
    for name in ("item_id", "score_label"):
        kept = pa.chunked_array([[rows[name][0].as_py()[-1:]]], rows[name].type)
        only_last = only_last.set_column(rows.column_names.index(name), name, kept)
    with pytest.raises(ArithmeticError):  # two items that score higher are left out
        check.see(chunk, only_last)


def test_a_block_lost_from_a_large_catalogue_is_met_by_the_items_drawn(world: Settings, tmp_path: Path) -> None:
    """The 30 best of 30,000 items, lost for a user: how likely that is seen does not depend on the catalogue's size."""
    strangers = ids_file(tmp_path, item_id=[f"stranger{i}" for i in range(32_000)])
    run = Run(str(tmp_path / "scores"))
    plan = plan_scores(asking(world, candidates=strangers))
    spooled_buckets(plan, run)
    scorer = BucketScorer(plan, run)
    chunk = next(iter(scorer._reader.chunks(1)))
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
    check = OnlineCheck(plan, scorer._scorer, scorer._answers.items, np.zeros(1, np.int64), drawn)
    with pytest.raises(ArithmeticError, match="scores of label differ"):
        check.see(chunk, rows)


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
    chunk = next(iter(scorer._reader.chunks(1)))
    rows = scorer._answers.rows(chunk)
    wrong = pa.array(
        [[score * 1.0001 for score in row] for row in rows["score_watch_ms"].to_pylist()], rows["score_watch_ms"].type
    )
    check = OnlineCheck(scorer._plan, scorer._scorer, scorer._answers.items, np.arange(len(rows)))
    with pytest.raises(ArithmeticError, match="scores of watch_ms differ by"):
        check.see(chunk, rows.set_column(rows.column_names.index("score_watch_ms"), "score_watch_ms", wrong))


def test_a_vector_that_the_serving_path_does_not_give_fails_the_run(world: Settings, tmp_path: Path) -> None:
    scorer = BucketScorer(plan_vectors(world), Run(str(tmp_path)))
    chunk = next(iter(scorer._reader.chunks(1)))
    rows = scorer._answers.rows(chunk)
    check = OnlineCheck(scorer._plan, scorer._scorer, None, np.arange(len(rows)))
    check.see(chunk, rows)
    assert check.num_compared == len(rows) > 1
    assert 0 < check.max_abs_diff <= 1e-5
    vectors = np.array(rows["vector"].to_pylist(), np.float32)
    of_another_user, broken = np.roll(vectors, 1, axis=0), np.where(np.arange(vectors.shape[1]) == 3, np.nan, vectors)
    for wrong in (of_another_user, broken, vectors * 1.001):
        column = pa.chunked_array([pa.array(list(wrong))])
        with pytest.raises(ArithmeticError, match="between the offline and the serving path"):
            check.see(chunk, rows.set_column(rows.column_names.index("vector"), "vector", column))


def test_the_checkpoint_not_the_settings_says_whether_there_are_vectors(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    no_layers = world.model_copy(update={"model": ModelSettings(**{**MODEL, "num_self_layers": 0})})
    check_model(plan_vectors(no_layers))
    publish_random_model(no_layers, seed=1)
    with pytest.raises(
        UserError, match=r"model\.json: model\.num_self_layers=0: the user's token of such a model is never"
    ):
        export_vectors(world)


def test_weights_that_are_not_finite_are_one_line(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    publish_random_model(world, seed=1, scale=np.nan)
    for run in (export_vectors, lambda settings: batch_score(asking(settings, catalogue=True, top_k=1))):
        with pytest.raises(UserError, match=r"model\.safetensors: weights that are not finite: train again"):
            run(world)


def test_ids_that_cannot_be_read_are_one_line(world: Settings, tmp_path: Path) -> None:
    good, other = ids_file(tmp_path, item_id=["item1"]), tmp_path / "other"
    other.mkdir()
    mistakes = {
        "no Parquet file there": str(tmp_path / "nowhere"),
        "no column user_id": good,
        "user_id is string, the tables' is int64": ids_file(tmp_path, user_id=["1"]),
    }
    for said, path in mistakes.items():
        with pytest.raises(UserError, match=said):
            batch_score(asking(world, users=path, candidates=good))
    for ids in ([1, None], [None]):
        with pytest.raises(UserError, match="1 rows without user_id"):
            batch_score(asking(world, users=ids_file(tmp_path, user_id=ids), candidates=good))
    for top_k in (None, 3):
        for type_ in (pa.string(), pa.null()):
            nothing = ids_file(other, item_id=pa.array([], type_))
            with pytest.raises(UserError, match=r"batch_score\.candidates=\S+: names no item_id: name some"):
                batch_score(asking(world, candidates=nothing, top_k=top_k))
    with pytest.raises(UserError, match=r"batch_score\.users=\S+: names no user_id: name some"):
        batch_score(asking(world, users=ids_file(tmp_path, user_id=pa.array([], pa.int64())), candidates=good))
    (tmp_path / "user_id.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        batch_score(asking(world, users=str(tmp_path / "user_id.parquet"), candidates=good))


def test_a_moment_that_the_table_no_longer_covers_is_refused(world: Settings, tmp_path: Path) -> None:
    past = asking(world, catalogue=True, top_k=1, request_ts="2023-11-20T00:00:00Z")
    scorer = BucketScorer(plan_scores(past), Run(str(tmp_path)))

    def score_all_buckets() -> None:
        for bucket in range(NUM_BUCKETS):
            scorer.write_bucket(bucket)

    with pytest.raises(UserError, match=r"the history windows of \d+ users at this request_ts start before"):
        score_all_buckets()
