"""Files that name users and candidates: read as they were when the run began, or refused in one line."""

import runpy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longer.config import Settings
from longer.data import id_lists
from longer.data.id_lists import IdList, read_spread, spread
from longer.data.parquet import read_columns
from longer.errors import UserError
from longer.serving import batch, batch_input
from longer.serving.batch import batch_score, spooled_buckets
from longer.serving.batch_output import Run
from longer.serving.batch_plan import plan_scores
from longer.serving.batch_scorer import BucketScorer
from tests.serving.batch_runs import asking, ids_file, score_here, world_with_requests
from tests.serving.tables import NUM_BUCKETS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return world_with_requests(tmp_path_factory.mktemp("ids"))


def test_files_replaced_under_a_run_never_become_its_answers(world: Settings, tmp_path: Path) -> None:
    users, candidates = ids_file(tmp_path, user_id=[5, 3]), ids_file(tmp_path, item_id=["item1", "item2"])
    plan, run = plan_scores(asking(world, users=users, candidates=candidates)), Run(str(tmp_path / "version"))
    buckets = spooled_buckets(plan, run)
    ids_file(tmp_path, user_id=[9]), ids_file(tmp_path, item_id=["item7"])  # a nightly export lands here
    scorer = BucketScorer(plan, run)
    files = [record["file"]["path"] for bucket in buckets for record in scorer.write_bucket(bucket)]
    rows = pa.concat_tables([read_columns(f"{run.version_path}/{file}") for file in files])
    assert sorted(rows["user_id"].to_pylist()) == [3, 5]
    assert rows["item_id"].to_pylist() == [["item1", "item2"]] * 2
    with pytest.raises(UserError, match=r"batch_score\.candidates=\S+: changed while this run read it"):
        spooled_buckets(plan, Run(str(tmp_path / "version")))
    ids_file(tmp_path, item_id=["item1", "item2"])
    with pytest.raises(UserError, match=r"batch_score\.users=\S+: changed while this run read it"):
        spooled_buckets(plan, Run(str(tmp_path / "version")))


def test_a_list_of_users_is_read_once_a_bucket_and_its_reading_is_in_the_seconds_of_the_run(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its digest and to spread it, before any bucket: a long list takes minutes, which a run must not leave out."""
    pieces, read_spread, read = IdList.pieces, batch_input.read_spread, list[int]()

    def slow(ids: IdList) -> Iterator[pa.Array]:
        time.sleep(0.2)
        return pieces(ids)

    def noting(folder: str, bucket: int, column: str) -> pa.Array:
        read.append(bucket)
        return read_spread(folder, bucket, column)

    monkeypatch.setattr(IdList, "pieces", slow)
    monkeypatch.setattr(batch_input, "read_spread", noting)
    monkeypatch.setattr(batch, "_score_buckets", score_here)
    users, candidates = ids_file(tmp_path, user_id=list(range(1, 9))), ids_file(tmp_path, item_id=["item1"])
    told = batch_score(asking(world, users=users, candidates=candidates)).manifest
    assert sorted(read) == list(range(NUM_BUCKETS))
    assert told["seconds"] > told["start_s"] > 4 * 0.2
    assert told["rows_per_s"] == pytest.approx(told["num_rows"] / (told["seconds"] - told["start_s"]))


def test_ids_of_other_files_are_other_inputs_however_they_are_cut(tmp_path: Path) -> None:
    def digest(*files: list[str]) -> str:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for number, ids in enumerate(files):
            pq.write_table(pa.table({"item_id": ids}), folder / f"{number}.parquet")
        return IdList(str(folder), "item_id", pa.string(), "batch_score.candidates").digest()

    assert digest(["a", "b", "c"]) == digest(["a"], ["b", "c"])
    assert len({digest(["a", "b"]), digest(["b", "a"]), digest(["a"]), digest(["a", "b", "b"])}) == 4


def test_users_named_in_very_many_files_are_few_parts_which_every_bucket_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, spread_to = tmp_path / "users", tmp_path / "spread"
    folder.mkdir()
    for number in range(20):
        pq.write_table(pa.table({"user_id": [3 * number, 3 * number + 1, number]}), folder / f"{number:02d}.parquet")
    ids = IdList(str(folder), "user_id", pa.int64(), "batch_score.users")
    monkeypatch.setattr(id_lists, "_PART_IDS", 32)
    count_P = spread(ids, ids.digest(), 5, str(spread_to))
    assert len(list(spread_to.iterdir())) == 2
    assert count_P.sum() == 60
    users = [read_spread(str(spread_to), bucket, "user_id").to_pylist() for bucket in range(5)]
    named = {3 * n + k for n in range(20) for k in (0, 1)} | set(range(20))
    assert sorted(user for some in users for user in some) == sorted(named)


def test_long_ids_of_users_are_more_parts_and_not_larger_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_lists, "_PIECE_IDS", 10)
    monkeypatch.setattr(id_lists, "_PART_BYTES", 20_000)
    ids = IdList(ids_file(tmp_path, user_id=[f"{n:01000d}" for n in range(100)]), "user_id", pa.string(), "a.users")
    spread_to = tmp_path / "spread"
    assert spread(ids, ids.digest(), 3, str(spread_to)).sum() == 100
    assert len(list(spread_to.iterdir())) == 5


def test_more_ids_than_one_list_can_hold_are_one_line(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked, candidates = MagicMock(), ids_file(tmp_path, item_id=["item1"])
    chunked.return_value.unique = MagicMock(side_effect=pa.ArrowCapacityError("more than 2147483646 bytes"))
    with monkeypatch.context() as patched:
        patched.setattr(pa, "chunked_array", chunked)
        with pytest.raises(UserError, match=r"batch_score\.candidates=\S+: more than 2 GiB of item_id: name fewer"):
            batch_score(asking(world, candidates=candidates))
    monkeypatch.setattr(id_lists, "_MOST_BYTES", 50)
    users = IdList(ids_file(tmp_path, user_id=["x" * 20] * 3), "user_id", pa.string(), "batch_score.users")
    with pytest.raises(UserError, match="more than 2 GiB of user_id in one bucket of users"):
        spread(users, users.digest(), 3, str(tmp_path / "spread"))


@pytest.mark.parametrize("job", ["batch_score", "export_embeddings"])
def test_a_file_of_ids_that_is_not_there_is_told_before_a_ray_is_looked_for(
    job: str, world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = str(tmp_path / "nowhere")
    given = [
        f"--root={world.root}",
        "--ray.address=127.0.0.1:1",
        f"--event_schema={world.event_schema.model_dump_json()}",
    ]
    items = ["--catalogue", "--top-k=3"] if job == "batch_score" else []
    monkeypatch.setattr("sys.argv", [job, *given, *items, f"--users={nowhere}"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module(f"jobs.{job}", run_name="__main__")
    assert capsys.readouterr().err.startswith(f"{job}.users={nowhere}: no Parquet file there")


def test_ids_that_cannot_be_read_are_one_line(world: Settings, tmp_path: Path) -> None:
    good, other = ids_file(tmp_path, item_id=["item1"]), tmp_path / "other"
    other.mkdir()
    mistakes = {
        "no Parquet file there": str(tmp_path / "nowhere"),
        "no column user_id": good,
        "user_id is string, the tables' is int64": ids_file(tmp_path, user_id=["1"]),
        "user_id above the largest int64: .* leave them out": ids_file(
            other, user_id=pa.array([1, 2**63], pa.uint64())
        ),
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


def test_ids_that_the_import_would_quarantine_are_not_scored_as_those_of_strangers(tmp_path: Path) -> None:
    unfit = {
        "2 rows with a negative some_id": pa.array([-1, 7, 3, -(2**63)]),
        "1 rows with a negative some_id": pa.array([-1, 7], pa.int8()).dictionary_encode(),
        "1 rows with an empty some_id": pa.array(["a", ""], pa.large_string()),
    }
    for said, ids in unfit.items():
        type_ = pa.string() if "empty" in said else pa.int64()
        with pytest.raises(UserError, match=rf"some_id\.parquet: {said}: the import takes none such: leave them out$"):
            IdList(ids_file(tmp_path, some_id=ids), "some_id", type_, "batch_score.users").digest()


def test_ids_of_any_integer_or_string_type_are_taken(tmp_path: Path) -> None:
    """Categoricals of pandas are dictionaries; ids that fit are ids, whatever held them."""

    def read(column: pa.Array, type_: pa.DataType) -> list:
        path = ids_file(tmp_path, some_id=column)
        return pa.chunked_array(list(IdList(path, "some_id", type_, "batch_score.users").pieces())).to_pylist()

    for type_ in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        assert read(pa.array(["b", "a", "b"], pa.string()).cast(type_), pa.string()) == ["b", "a", "b"]
    for column in (
        pa.array([2, 1, 2], pa.int8()),
        pa.array([2, 1, 2], pa.uint64()),
        pa.array([2, 1, 2]).dictionary_encode(),
    ):
        assert read(column, pa.int64()) == [2, 1, 2]
    with pytest.raises(UserError, match="1 rows without some_id"):
        read(pa.DictionaryArray.from_arrays(pa.array([0, None]), pa.array(["a"])), pa.string())
