"""Scores of a split against those served over HTTP: at the run's own precision, and without reading more than a part of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longer.config import Settings
from longer.data.parquet import read_columns
from longer.data.records import Record
from longer.data.scores import read_scores
from longer.errors import StorageError, UserError
from longer.serving import batch
from longer.serving.batch import batch_score
from longer.serving.batch_online import check_against_online
from longer.serving.batch_plan import Plan, plan_scores
from longer.storage import Table, Version, checked_output
from tests.serving.batch_runs import asking, score_here, world_with_requests
from tests.serving.tables import NUM_BUCKETS, publish_random_model


def publish_online(world: Settings, scored: Version, rows: pa.Table, name: str) -> None:
    """As `jobs.serve_check` does, of the same tables."""
    table = Table(world.path("serving_check"))
    with checked_output(table.begin(name), "scores/part-0.parquet") as sink:
        pq.write_table(rows, sink)
    table.publish(name, {"inputs": scored.manifest["inputs"]}, [sink.data_file])


def test_a_bf16_run_is_compared_with_float32_answers_at_its_own_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_with_requests(tmp_path / "world")
    monkeypatch.setattr(batch, "_score_buckets", score_here)
    exact = batch_score(world)
    rows = pa.concat_tables([read_columns(file) for file in exact.files()])
    publish_online(world, exact, rows, "online")

    def in_bf16(settings: Settings) -> Plan:
        return replace(plan_scores(settings), precision="bf16")

    monkeypatch.setattr(batch, "plan_scores", in_bf16)
    rough = batch_score(world)
    assert rough.id != exact.id
    record = check_against_online(world, rough).manifest
    assert 1e-5 < record["max_abs_diff_vs_online"] < 1e-2
    assert record["compared_requests"] == len(rows)
    halved = pa.array(
        [[score / 2 for score in row] for row in rows["score_label"].to_pylist()], rows["score_label"].type
    )
    publish_online(
        world, exact, rows.set_column(rows.column_names.index("score_label"), "score_label", halved), "other"
    )
    with pytest.raises(UserError, match=r"^batch_score.precision=bf16: scores of label differ by .* set float32, or"):
        check_against_online(world, rough)
    with pytest.raises(ArithmeticError, match=f"more than 1e-05.*{exact.id} is published all the same, and current"):
        check_against_online(world, exact)


def test_what_a_killed_run_of_another_version_left_goes_and_the_comparisons_with_served_scores_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On local disk it would else stay for ever."""
    world = world_with_requests(tmp_path / "world")
    monkeypatch.setattr(batch, "_score_buckets", score_here)
    exact = batch_score(world)
    checked = check_against_online(world, exact)
    left = Path(exact.table_path) / "0123456789ab/bucket=0000/part-0.parquet"
    left.parent.mkdir(parents=True)
    left.touch()
    monkeypatch.setattr(batch, "plan_scores", lambda settings: replace(plan_scores(settings), precision="bf16"))
    rough = batch_score(world)
    assert not (Path(exact.table_path) / "0123456789ab").exists()
    assert exact.is_whole()
    assert Table(exact.table_path).current() == rough
    assert Table(world.path("batch_scores", "check")).current() == checked


def test_a_killed_run_goes_on_though_another_question_was_asked_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as there is no other model or table, of which it would be asked anew."""
    world, scored = world_with_requests(tmp_path / "world"), list[int]()

    def ask(top_k: int, num_buckets: int = NUM_BUCKETS) -> Version:
        def score_some(*of: Any) -> list[Record]:
            some = dict(list(of[4].items())[:num_buckets])
            scored.extend(some)
            records = score_here(*of[:4], some, of[5])
            if num_buckets < NUM_BUCKETS:
                raise KeyboardInterrupt
            return records

        scored.clear()
        monkeypatch.setattr(batch, "_score_buckets", score_some)
        return batch_score(asking(world, catalogue=True, top_k=top_k))

    with pytest.raises(KeyboardInterrupt):
        ask(2, num_buckets=2)
    ask(3)
    ask(2)
    assert len(scored) == 1, "what was done is done again"
    with pytest.raises(KeyboardInterrupt):
        ask(4, num_buckets=2)
    publish_random_model(world, seed=1)
    ask(3)
    assert len(list(Path(world.path("top_items")).glob("*/"))) == 3, (
        "what is of a model that is no more lies there for ever"
    )


def test_row_groups_without_a_request_that_is_asked_for_are_not_read(tmp_path: Path) -> None:
    table, num_rows, num_items = Table(str(tmp_path / "scores")), 20_000, 50
    offsets = pa.array(np.arange(num_rows + 1, dtype=np.int32) * num_items)
    scores = np.random.default_rng(0).random(num_rows * num_items, np.float32)
    rows = pa.table(
        {"request_id": np.arange(num_rows), "score_label": pa.ListArray.from_arrays(offsets, pa.array(scores))}
    )
    with checked_output(table.begin("one"), "bucket=0000/part-0.parquet") as sink:
        pq.write_table(rows, sink, row_group_size=1_000, use_dictionary=False)
    version = table.publish("one", {}, [sink.data_file])
    assert read_scores(version).equals(rows)
    assert not len(read_scores(version, np.array([-1])))
    damaged = bytearray(Path(version.files()[0]).read_bytes())
    metadata = pq.read_metadata(version.files()[0])
    for group in set(range(metadata.num_row_groups)) - {0, 4, 19}:
        column = metadata.row_group(group).column(1)
        end = column.data_page_offset + column.total_compressed_size
        damaged[column.data_page_offset : end] = bytes(column.total_compressed_size)
    Path(version.files()[0]).write_bytes(damaged)
    assert read_scores(version, np.array([3, 4_500, 19_999, 10**6])).equals(rows.take([3, 4_500, 19_999]))
    with pytest.raises(StorageError, match="not readable"):
        read_scores(version)
