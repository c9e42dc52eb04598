"""Which requests are scored: a split of the root's table, every request in one run, or those of another table, if it fits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longer.config import Settings
from longer.data.parquet import read_columns
from longer.data.requests import SPLITS
from longer.errors import UserError
from longer.serving import batch, batch_input
from longer.serving.batch import batch_score
from longer.serving.batch_output import Run
from longer.serving.batch_plan import plan_scores
from longer.serving.batch_scorer import BucketScorer
from longer.storage import Table, Version, checked_output
from tests.serving.batch_runs import asking, score_here, world_with_requests, written_here
from tests.serving.tables import NUM_BUCKETS

Change = Callable[[pa.Table], pa.Table]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return world_with_requests(tmp_path_factory.mktemp("requests"))


def published(world: Settings, folder: Path, change: Change, **manifest: object) -> str:
    """The root's requests once more in another folder, changed."""
    mine, table = Table(world.path("tables", "requests")).require("jobs.build_requests"), Table(str(folder))
    path, files = table.begin("another"), []
    for file in mine.data_files():
        with checked_output(path, file.path) as sink:
            pq.write_table(change(read_columns(mine.path_of(file))), sink)
        files.append(sink.data_file)
    about = {name: mine.manifest[name] for name in ("schema_hash", "inputs", "num_buckets", "num_requests")}
    table.publish("another", about | manifest, files)
    return str(folder)


def by_id(rows: pa.Table) -> pa.Table:
    return rows.sort_by("request_id").combine_chunks()


def test_every_request_is_scored_in_one_run_as_its_split_alone_is(world: Settings, tmp_path: Path) -> None:
    every = written_here(plan_scores(asking(world, split="all")), tmp_path / "all")
    alone = [written_here(plan_scores(asking(world, split=split)), tmp_path / split) for split in SPLITS]
    assert all(len(rows) for rows in alone)
    apart, together = by_id(pa.concat_tables(alone)), by_id(every)
    same = [name for name in apart.column_names if name != "score_label"]
    assert together.select(same).equals(apart.select(same))
    scores = [rows["score_label"].combine_chunks().flatten().to_numpy() for rows in (together, apart)]
    np.testing.assert_allclose(*scores, atol=1e-6)


@pytest.mark.parametrize("most_values", [1 << 20, 90, 1])
def test_all_requests_of_a_user_come_in_one_chunk_in_time_order_or_in_bounded_ones(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_values: int
) -> None:
    """So that a history is encoded once for all of them: three files, one a split, become one that ascends by user."""
    monkeypatch.setattr(batch_input, "_CHUNK_VALUES", most_values)
    reader = BucketScorer(plan_scores(asking(world, split="all")), Run(str(tmp_path)))._reader
    for bucket in range(NUM_BUCKETS):
        num_requests, questions = reader.bucket(bucket)
        chunks = [(chunk, chunk.rows) for chunk in questions if chunk.rows]
        rows = pa.concat_tables([rows for _, rows in chunks])
        assert len(rows) == num_requests
        assert rows["user_id"].to_pylist() == sorted(rows["user_id"].to_pylist())
        assert [chunk.first for chunk, _ in chunks] == [sum(len(r) for _, r in chunks[:n]) for n in range(len(chunks))]
        if most_values == 1 << 20:
            assert sum(len(rows["user_id"].unique()) for _, rows in chunks) == len(rows["user_id"].unique())
            in_time = rows.sort_by([("user_id", "ascending"), ("request_ts", "ascending")])
            assert rows["request_ts"].equals(in_time["request_ts"])
        else:  # one request of each split at least
            sizes = [(len(rows), len(rows["item_id"].combine_chunks().flatten())) for _, rows in chunks]
            assert all(num_values <= most_values or num <= len(SPLITS) for num, num_values in sizes)


def test_parts_are_put_together_by_ids_of_texts_too_whatever_tables_they_come_in() -> None:
    """By their bytes, as the tables ascend: capitals before small letters, both before other alphabets."""
    ids = ["B", "B", "a", "a", "a", "b", "é", "я", "я"]
    rows = pa.table({"user_id": ids, "row": range(len(ids))})
    parts = [rows.take([n for n in range(len(ids)) if n % 3 == part]) for part in range(3)]
    cut = [
        [part.slice(n, size) for n in range(0, len(part), size)] for part, size in zip(parts, (1, 2, 3), strict=True)
    ]
    together = pa.concat_tables(batch_input._by_user([iter(tables) for tables in cut]))
    assert together["user_id"].to_pylist() == ids
    assert sorted(together["row"].to_pylist()) == list(range(len(ids)))


def test_the_requests_of_another_table_are_scored_beside_the_roots(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_score_buckets", score_here)

    def without_the_first_item(rows: pa.Table) -> pa.Table:
        for name in ("item_id", "category", "price", "label"):
            lists = pa.array([values[1:] for values in rows[name].to_pylist()], rows.schema.field(name).type)
            rows = rows.set_column(rows.column_names.index(name), name, lists)
        return rows

    def scored(**asked: object) -> Version:
        return batch_score(asking(world, split="valid", **asked))

    named = published(world, tmp_path / "mine", without_the_first_item)
    mine, roots = scored(requests_table=named), scored()
    assert scored(requests_table=f"{named}/another/") == mine, "a version of a table is named by its folder"
    assert mine.id != roots.id
    assert mine.manifest["inputs"] == roots.manifest["inputs"] | {"requests": "another"}
    shorter, rows = (by_id(pa.concat_tables([read_columns(file) for file in v.files()])) for v in (mine, roots))
    assert shorter["item_id"].to_pylist() == [items[1:] for items in rows["item_id"].to_pylist()]
    for some, all_ in zip(shorter["score_label"].to_pylist(), rows["score_label"].to_pylist(), strict=True):
        np.testing.assert_allclose(some, all_[1:], atol=1e-6)


@pytest.mark.parametrize("more", [1, -1])
def test_a_history_that_is_not_the_events_before_its_request_is_refused(
    world: Settings, tmp_path: Path, more: int
) -> None:
    """One event more would tell the future; one less would score another history than is said."""

    def of_another_length(rows: pa.Table) -> pa.Table:
        """Of the first request of a bucket that has room for it."""
        ends = rows["history_end"].to_numpy().copy()
        ends[np.flatnonzero(ends > 0)[0]] += more
        return rows.set_column(rows.column_names.index("history_end"), "history_end", pa.array(ends))

    named = published(world, tmp_path / "mine", of_another_length)
    scorer = BucketScorer(plan_scores(asking(world, requests_table=named)), Run(str(tmp_path / "version")))
    said = (
        r"at least 1 test requests have a history with events at or after their time, or without some before it: .*jobs\.verify "
        rf"--verify\.requests {named} --verify\.requests_version another`"
    )
    for bucket in range(NUM_BUCKETS):
        with pytest.raises(UserError, match=said):
            scorer.write_bucket(bucket)


def test_a_table_that_does_not_fit_is_one_line_that_names_it(world: Settings, tmp_path: Path) -> None:
    other = published(world, tmp_path / "of_others", lambda rows: rows, inputs={"sequences": "0123456789ab"})
    schema = published(world, tmp_path / "of_another_schema", lambda rows: rows, schema_hash="another")
    empty = published(world, tmp_path / "empty", lambda rows: rows, num_requests=dict.fromkeys(SPLITS, 0))
    (tmp_path / "rows.parquet").touch()
    mistakes = {
        str(tmp_path / "rows.parquet"): r"batch_score\.requests_table=\S+rows\.parquet: no published request table",
        str(tmp_path / "nowhere"): r"batch_score\.requests_table=\S+nowhere: no published request table: name a folder",
        world.path("tables", "sequences"): r"batch_score\.requests_table=\S+sequences: no published request table",
        other: r"batch_score\.requests_table=\S+of_others: made from version 0123456789ab of the sequences, which \S+ does",
        schema: r"of_another_schema: version another was built with another event_schema",
        empty: r"batch_score\.split=all: no requests in it",
    }
    for path, said in mistakes.items():
        with pytest.raises(UserError, match=said) as caught:
            plan_scores(asking(world, requests_table=path, split="all"))
        assert "\n" not in str(caught.value)
