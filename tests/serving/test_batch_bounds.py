"""An offline run holds a bounded part of a bucket, whatever is in it, and refuses tables that do not fit each other."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from longer.config import Settings
from longer.data.columns import plain_bytes
from longer.data.parquet import open_encoded
from longer.errors import UserError
from longer.model.longer import Longer
from longer.serving import batch_input, batch_output
from longer.serving.batch import spooled_buckets
from longer.serving.batch_check import OnlineCheck, compare
from longer.serving.batch_input import Chunk
from longer.serving.batch_output import Run, write_rows
from longer.serving.batch_plan import check_model, plan_scores, plan_vectors
from longer.serving.batch_scorer import BucketScorer
from longer.serving.questions import Budget
from tests.model.generate import small_model
from tests.serving.batch_runs import asking, ids_file, world_with_requests, written_here
from tests.serving.tables import NUM_USERS, SCHEMA


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return world_with_requests(tmp_path_factory.mktemp("bounds"))


def chunks_of(settings: Settings, folder: Path) -> list[Chunk]:
    plan, run = plan_scores(settings), Run(str(folder))
    buckets = spooled_buckets(plan, run)
    reader = BucketScorer(plan, run)._reader
    return [chunk for bucket in buckets for chunk in reader.bucket(bucket)[1]]


@pytest.mark.parametrize("of_users", [False, True])
def test_a_chunk_holds_a_bounded_number_of_events_or_one_user(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_users: bool
) -> None:
    monkeypatch.setattr(batch_input, "_CHUNK_EVENTS", 50)
    chunks = chunks_of(asking(world, catalogue=True, top_k=1) if of_users else world, tmp_path)
    for chunk in chunks:
        num_events_B = np.diff(chunk.questions.histories.offsets_B1)
        assert num_events_B[1:].sum() < 50, "users after the first one fill more than a chunk"
    assert any(len(chunk.questions.histories) > 1 for chunk in chunks)
    assert len(chunks) > 4


def test_a_chunk_of_users_keeps_a_bounded_number_of_scores(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = ids_file(tmp_path, item_id=["item1", "item2", "item3"])
    monkeypatch.setattr(batch_input, "_CHUNK_VALUES", 7)
    chunks = chunks_of(asking(world, candidates=candidates), tmp_path / "values")
    assert max(len(chunk.questions) for chunk in chunks) == 2
    monkeypatch.setattr(batch_input, "_CHUNK_VALUES", 1)
    assert {len(chunk.questions) for chunk in chunks_of(asking(world, candidates=candidates), tmp_path / "one")} == {1}
    monkeypatch.setattr(batch_input, "_CHUNK_VALUES", 1 << 20)
    monkeypatch.setattr(batch_input, "_CHUNK_REQUESTS", 3)
    chunks = chunks_of(asking(world, candidates=candidates), tmp_path / "requests")
    assert max(len(chunk.questions) for chunk in chunks) == 3
    assert sum(len(chunk.questions) for chunk in chunks) == NUM_USERS


@pytest.mark.parametrize("top_k", [None, 3])
def test_long_ids_of_candidates_do_not_make_a_chunk_of_users_large(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top_k: int | None
) -> None:
    """Of 40 ids three have a kilobyte: they may be anyone's best."""
    ids = [f"item{n}" + ("x" * 1000 if n % 15 == 7 else "") for n in range(40)]
    asked = asking(world, candidates=ids_file(tmp_path, item_id=ids), top_k=top_k)
    whole = written_here(plan_scores(asked), tmp_path / "whole")
    monkeypatch.setattr(batch_input, "_CHUNK_BYTES", 8000)
    plan, run = plan_scores(asked), Run(str(tmp_path / "cut"))
    buckets = spooled_buckets(plan, run)
    scorer = BucketScorer(plan, run)
    sizes = [scorer._answers.rows(chunk)["item_id"].nbytes for b in buckets for chunk in scorer._reader.bucket(b)[1]]
    assert len(sizes) == 5, "two users at once, of three a bucket"
    assert max(sizes) <= 8000
    assert written_here(plan, tmp_path / "written")["item_id"].equals(whole["item_id"])


def test_long_ids_of_users_do_not_make_a_chunk_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest of them come last, as they are sorted: an average would not tell."""
    world = world_with_requests(tmp_path / "world", event_schema={**SCHEMA, "user_id": "string"})
    users = [f"{n:03d}" for n in range(60)] + ["z" * 900 + str(n) for n in range(20)]
    asked = asking(world, users=ids_file(tmp_path, user_id=users), candidates=ids_file(tmp_path, item_id=["item1"]))
    monkeypatch.setattr(batch_input, "_CHUNK_BYTES", 2000)
    chunks = chunks_of(asked, tmp_path / "run")
    assert max(chunk.user_id_R.nbytes for chunk in chunks) <= 2000
    assert sorted(user for chunk in chunks for user in chunk.user_id_R.to_pylist()) == sorted(users)


def test_requests_with_long_ids_come_in_tables_of_bounded_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one part and as one of two, which are put together; one request alone has more."""
    sizes, path = [5, 5, 2000, 5, 300, 5, 5, 5, 300, 300, 5, 5], f"{tmp_path}/requests.parquet"
    rows = pa.table(
        {
            "row": range(len(sizes)),
            "user_id": [1] * len(sizes),
            "item_id": [["x" * size] * 2 for size in sizes],
            "category": [["c" * 5000] * 2] * len(sizes),
        }
    )
    pq.write_table(rows, path)
    monkeypatch.setattr(batch_input, "_CHUNK_BYTES", 1500)
    file = open_encoded(path, Path(path).stat().st_size, ["category"])
    for num_parts in (1, 2):
        tables = list(batch_input._tables(file, rows.column_names, num_parts))
        assert all(plain_bytes(t.combine_chunks().to_batches()[0]) <= 1500 // num_parts or len(t) == 1 for t in tables)
        assert 4 <= len(tables) <= 6
        assert [row for table in tables for row in table.to_pylist()] == rows.to_pylist()


def test_ids_of_items_left_out_are_not_laid_out_until_they_are_compared(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the catalogue's ids for each user that is checked would be the largest part of a run whose ids are long."""
    candidates = ids_file(tmp_path, item_id=["item" + "x" * 1000 + str(n) for n in range(1000)])
    plan, run = plan_scores(asking(world, candidates=candidates, top_k=3)), Run(str(tmp_path / "run"))
    spooled_buckets(plan, run)
    scorer = BucketScorer(plan, run)
    chunk = next(iter(scorer._reader.bucket(1)[1]))
    rows, num = scorer._answers.rows(chunk), len(chunk.questions)
    check = OnlineCheck(plan, scorer._scorer, scorer._answers.items, np.arange(num), 10_000, (0,), 1000)
    before = pa.total_allocated_bytes()
    check.see(chunk, rows)
    assert pa.total_allocated_bytes() - before < 100_000
    assert check.num_candidates == num * 1000
    compare([check])
    assert check.num_compared == num


def test_requests_come_in_bounded_tables_whole_and_in_order_whatever_the_row_groups_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row group with texts of its own; three candidates a request, so that a table of ten values has three requests."""
    sizes, path, first = (1, 1, 1, 7, 2, 1), f"{tmp_path}/requests.parquet", 0
    schema = pa.schema({"row": pa.int64(), "item_id": pa.list_(pa.int64()), "category": pa.list_(pa.string())})
    with pq.ParquetWriter(path, schema) as writer:
        for size in sizes:
            rows = [
                {"row": first + n, "item_id": [1, 2, 3], "category": [None, f"{first}", f"{n}"]} for n in range(size)
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))
            first += size
    monkeypatch.setattr(batch_input, "_CHUNK_VALUES", 10)
    file = open_encoded(path, Path(path).stat().st_size, ["category"])
    tables = list(batch_input._tables(file, schema.names))
    assert [len(table) for table in tables] == [3, 3, 3, 3, 1]
    assert pa.types.is_dictionary(tables[0].schema.field("category").type.value_type)
    assert [row for table in tables for row in table.to_pylist()] == pq.read_table(path).to_pylist()


def test_requests_with_very_many_candidates_are_not_in_one_table_because_others_have_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row group of 200 requests, 20 of them with 1,000 candidates: on average it has 100."""
    sizes, path = [1_000 if row % 10 == 3 else 1 for row in range(200)], f"{tmp_path}/requests.parquet"
    rows = pa.table({"row": range(200), "item_id": [list(range(size)) for size in sizes]})
    pq.write_table(rows, path)
    file = open_encoded(path, Path(path).stat().st_size, [])
    for most in (3_000, 500):
        monkeypatch.setattr(batch_input, "_CHUNK_VALUES", most)
        tables = list(batch_input._tables(file, rows.column_names))
        assert all(len(t["item_id"].combine_chunks().flatten()) <= most or len(t) == 1 for t in tables)
        assert sum(sizes) / most <= len(tables) <= 45
        assert pa.concat_tables(tables).to_pylist() == rows.to_pylist()


def test_rows_go_to_the_file_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most the row group that is made, the one that is written and the one that waits are ahead of the file."""
    monkeypatch.setattr(batch_output, "_ROW_GROUP_BYTES", 1 << 20)
    part, sizes = pa.table({"x": np.random.default_rng(0).random(1 << 17)}), []

    def parts() -> Iterator[pa.Table]:
        for _ in range(12):
            yield part
            sizes.append(max((path.stat().st_size for path in tmp_path.rglob("*.parquet")), default=0))

    written = write_rows(str(tmp_path), "rows.parquet", parts())
    assert written
    assert sizes[-1] >= (12 - 4) * part.nbytes * 0.9, "the rows waited in memory"
    with pq.ParquetFile(tmp_path / "rows.parquet") as file:
        assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [1 << 17] * 12


def test_users_are_encoded_together_within_half_of_the_bytes_or_alone() -> None:
    num_events_B = np.random.default_rng(0).integers(0, 3000, 200)
    budget = Budget(small_model(dtype=torch.float32), 1 << 22)
    assert isinstance(budget.model, Longer)
    num_asked_B = np.random.default_rng(1).integers(1, 20, 200)
    batches = budget.users(num_events_B, num_asked_B)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(200))
    for users in batches:
        num_bytes = np.sort(budget.user_bytes(num_events_B[users], num_asked_B[users]))
        assert num_bytes[1:].sum() < budget.num_bytes // 2
    assert 1 < len(batches) < 200


def test_one_long_history_does_not_pad_many_short_ones_beyond_the_bytes() -> None:
    """The keys and values of its groups alone, once for each who is encoded with it: the rest of a batch is with it by chance."""
    budget, together = Budget(small_model(dtype=torch.float32), 8 << 20), list[int]()
    model = budget.model
    padded_bytes = 2 * 4 * model.settings.width * 3000 // model.windows.merge_size
    for num_users in range(2, 1000, 7):
        num_events_B = np.array([5] * (num_users - 1) + [3000])
        batches = budget.users(num_events_B, np.ones(num_users, np.int64))
        [with_it] = [batch for batch in batches if num_users - 1 in batch]
        together.append(len(with_it))
    assert 1 < max(together) <= budget.num_bytes // 2 // padded_bytes


def test_requests_with_more_history_than_the_table_holds_are_refused(world: Settings, tmp_path: Path) -> None:
    reader = BucketScorer(plan_scores(world), Run(str(tmp_path)))._reader
    questions = next(iter(reader.bucket(1)[1])).questions
    reader._check(questions)
    held_R = questions.histories.end_index_B[questions.row_R]
    with pytest.raises(UserError, match=r"at least 1 test requests have more history than .* `python -m jobs\.verify "):
        reader._check(replace(questions, history_end_R=held_R + (np.arange(len(held_R)) == 0)))


def test_a_checkpoint_of_another_schema_is_refused_before_any_actor_starts(world: Settings) -> None:
    other = world.event_schema.model_copy(update={"features": world.event_schema.features[:2]})
    for plan in (plan_scores(world), plan_vectors(world)):
        check_model(plan)
        with pytest.raises(UserError, match="is not the settings' event_schema"):
            check_model(replace(plan, schema=other))
