"""Users times candidates, users' best items, users' vectors: what is published is what the model says of each user."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import build_sequences
from longer.batch_settings import ExportSettings
from longer.config import Settings
from longer.data.items import read_items
from longer.data.parquet import read_columns
from longer.data.records import Record
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.files import checksum, file_sizes, write_bytes
from longer.serving import batch, batch_input, batch_output
from longer.serving.batch import batch_score, export_vectors
from longer.serving.batch_output import Run
from longer.serving.batch_plan import Plan, plan_scores, plan_vectors
from longer.serving.batch_scorer import BucketScorer
from longer.storage import Table
from longer.training.checkpoints import load_model
from tests.data.test_increments import add_events
from tests.serving.batch_runs import (
    asking,
    expected_scores,
    ids_file,
    questions_of,
    rows_of,
    score_here,
    vector_of,
    world_with_requests,
    written_here,
)
from tests.serving.tables import (
    DAY_MS,
    NUM_BUCKETS,
    NUM_ITEMS,
    NUM_USERS,
    START_MS,
    build_world,
    checkpoint_path,
    random_events,
)

MIDDAY = "2023-12-11T12:00:00Z"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return world_with_requests(tmp_path_factory.mktemp("users"))


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
def test_the_catalogue_is_there_where_a_schema_has_ids_only_and_is_built_by_the_job_that_builds_the_sequences(
    tmp_path: Path,
) -> None:
    world = build_world(tmp_path, event_schema={"user_id": "int64", "item_id": "string"})
    items = Table(world.path("tables", "items"))
    items.clear()
    for candidates in (None, ids_file(tmp_path, item_id=["item1"])):  # a table from before, which had none
        asked = asking(world, candidates=candidates, catalogue=candidates is None, top_k=3)
        if candidates:
            assert plan_scores(asked).inputs.keys() == {"checkpoint", "sequences", "candidates"}
        else:
            with pytest.raises(UserError, match=r"items: version .* run `python -m jobs\.build_sequences`"):
                plan_scores(asked)
    add_events(world, random_events(world.event_schema, seed=0), None)
    sequences = build_sequences.run(world)
    published = read_items(world.path("tables", "items"), sequences.id, world.event_schema)
    assert published.column_names == ["item_id", "event_ts"]
    assert sorted(published["item_id"].to_pylist()) == sorted(f"item{i}" for i in range(NUM_ITEMS))
    rows = rows_of(batch_score(asking(world, catalogue=True, top_k=NUM_ITEMS)))
    assert [sorted(ids) for ids in rows["item_id"].to_pylist()] == [
        sorted(published["item_id"].to_pylist())
    ] * NUM_USERS
    everyone, moment = list(range(1, NUM_USERS + 1)), rows["request_ts"].cast(pa.int64())[0].as_py()
    expected = expected_scores(world, everyone, [f"item{i}" for i in range(NUM_ITEMS)], moment)
    np.testing.assert_allclose(rows["score_label"].to_pylist(), -np.sort(-expected), atol=1e-5)


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
    [whole] = BucketScorer(plan_scores(world), Run(str(tmp_path / "whole"))).write_bucket(1)
    monkeypatch.setattr(batch_input, "_CHUNK_REQUESTS", 3)
    monkeypatch.setattr(batch_input, "_CHUNK_EVENTS", 10)
    [cut] = BucketScorer(plan_scores(world), Run(str(tmp_path / "cut"))).write_bucket(1)
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
    """Both write other bytes, as with other batches. One that reads files of its own finds them gone, and dies of it."""
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
        monkeypatch.setattr(batch_input, "_CHUNK_REQUESTS", 1)
        monkeypatch.setattr(batch_output, "_ROW_GROUP_BYTES", 1)
        return first + [record for bucket in buckets[1:] for record in scorer.write_bucket(bucket)]

    monkeypatch.setattr(batch, "_score_buckets", overtaken)
    slower = batch_score(asking(world, **chosen))
    assert slower == faster[0]
    assert "another run has published it meanwhile" in capsys.readouterr().err
    assert [checksum(slower.path_of(file)) for file in slower.data_files()] == [f.sha256 for f in slower.data_files()]
    assert {f"{slower.path}/{path}" for path in file_sizes(slower.path) if path != "_MANIFEST.json"} == set(
        slower.files()
    )


@pytest.mark.parametrize(("asked", "milliseconds"), [(0, 0), (400, 1), (999, 1), (1000, 1), (1001, 2), (-400, 0)])
def test_a_part_of_a_millisecond_loses_no_event_before_it(world: Settings, asked: int, milliseconds: int) -> None:
    moment = datetime.fromisoformat(MIDDAY)
    plans = [
        plan_scores(asking(world, catalogue=True, top_k=1, request_ts=moment + timedelta(microseconds=us)))
        for us in (0, asked)
    ]
    assert plans[0].request_ts is not None
    assert plans[1].request_ts == plans[0].request_ts + milliseconds
    assert plans[0].request_ts == moment.timestamp() * 1000


def test_a_moment_that_the_table_no_longer_covers_is_refused_and_the_count_is_not_told_as_that_of_all_users(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk's users are counted; the others are not read any more."""
    past = asking(world, catalogue=True, top_k=1, request_ts="2023-11-20T00:00:00Z")
    scorer = BucketScorer(plan_scores(past), Run(str(tmp_path)))

    def score_all_buckets() -> None:
        for bucket in range(NUM_BUCKETS):
            scorer.write_bucket(bucket)

    said = r"the history windows of at least \d+ users at this request_ts start before"
    with pytest.raises(UserError, match=said):
        score_all_buckets()
    monkeypatch.setattr(batch_input, "_CHUNK_REQUESTS", 1)
    with pytest.raises(UserError, match=said.replace(r"\d+", "1")):
        score_all_buckets()
