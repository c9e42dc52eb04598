"""Each importer reads its log's real layout, as the settings that come with it choose; a log that is not there is one line."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from longer.config import load_settings
from longer.data.events import check_rows
from longer.datasets import source_of
from longer.errors import UserError
from tests.datasets import logs

CONFIGS = Path(__file__).parents[2] / "configs" / "datasets"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def imported(dataset: str, write: Callable[[Path], None], folder: Path) -> tuple[pa.Table, pa.Table]:
    """Events and unfit rows of the log that `write` makes, with the dataset's own settings."""
    write(folder)
    settings = load_settings(f"{CONFIGS}/{dataset}.yaml", {"import_events": {"source": str(folder)}})
    source, schema = source_of(settings.import_events), settings.event_schema
    names = schema.events_arrow().names
    checked = [
        check_rows(batch, schema, NOW, source.TIME_UNIT)
        for part in source.locate(str(folder))
        for batch in source.read(part, names)
    ]
    good, bad = zip(*checked, strict=True)
    return pa.concat_tables(good), pa.concat_tables(bad, promote_options="default")


@pytest.mark.parametrize("write", [logs.movielens_100k, logs.movielens_1m, logs.movielens_25m])
def test_the_three_layouts_of_movielens_give_the_same_events(write: Callable[[Path], None], tmp_path: Path) -> None:
    events, bad = imported("movielens", write, tmp_path)
    assert len(bad) == 0
    assert events.to_pydict() == {
        "user_id": [7, 7, 9],
        "event_ts": [datetime(1997, 12, 4, 15, 55, second, tzinfo=UTC) for second in (49, 50, 51)],
        "item_id": [1, 2, 3],
        "action": ["rating"] * 3,
        "genres": ["Animation|Children's|Comedy", "Action", "unknown"],
        "rating": [5.0, 3.0, 1.0],
    }


def test_kuairand_gives_the_feed_and_the_random_exposures(tmp_path: Path) -> None:
    events, bad = imported("kuairand", logs.kuairand, tmp_path)
    assert len(bad) == 0
    events = events.sort_by("event_ts")
    assert events["event_ts"].cast(pa.int64()).to_pylist() == [1649408076860, 1650585600000, 1650675600000]
    assert events["item_id"].to_pylist() == [101, 102, 103]
    assert events["action"].to_pylist() == ["click", "impression", "impression"]
    assert events["is_rand"].to_pylist() == ["0", "0", "1"]
    assert events["is_like"].to_pylist() == [0, 1, 0]
    assert events["play_time_ms"].to_pylist() == [17504, 0, 1385]


def test_yambda_by_kind_gives_each_file_its_action_and_null_for_what_only_listens_have(tmp_path: Path) -> None:
    events, bad = imported("yambda", logs.yambda_listens, tmp_path)
    assert len(bad) == 0
    assert events["action"].to_pylist() == ["like", "listen", "listen", "listen"]
    assert events["played_ratio_pct"].to_pylist() == [None, 100, 3, 150]
    assert events["is_organic"].to_pylist() == ["1", "1", "0", "1"]
    assert events["event_ts"].cast(pa.int64()).to_pylist() == [0, 0, 20_190_500_000, 25_999_995_000]


def test_yambda_with_all_events_in_one_file_does_not_read_them_again_by_kind(tmp_path: Path) -> None:
    events, _ = imported("yambda", logs.yambda_multi_event, tmp_path)
    assert events["action"].to_pylist() == ["listen", "like", "listen"]
    assert events["track_length_seconds"].to_pylist() == [200, None, 200]


def test_taobaos_broken_lines_are_told_apart(tmp_path: Path) -> None:
    events, bad = imported("taobao", logs.taobao, tmp_path)
    assert events["action"].to_pylist() == ["pv", "buy", "fav"]
    assert events["category"].to_pylist() == ["2520377", "2520771", "2520377"]
    assert events["event_ts"][0].as_py() == datetime(2017, 11, 24, 17, 21, 10, tzinfo=UTC)
    assert bad["reason"].to_pylist() == ["event_ts before 1970", "event_ts in the future", "not 5 fields"]
    assert bad["line"].to_pylist() == [None, None, "3,1,1,cart"]


@pytest.mark.parametrize("dataset", ["movielens", "kuairand", "yambda", "taobao", "generic"])
def test_a_folder_without_the_log_says_what_it_must_hold(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text("nothing here")
    with pytest.raises(UserError, match=r"import_events.source: .*must hold .*\.(csv|parquet|dat|data)") as caught:
        imported(dataset, lambda folder: None, tmp_path)
    assert "\n" not in str(caught.value)


def test_ratings_without_their_movies_name_the_missing_file(tmp_path: Path) -> None:
    logs.movielens_1m(tmp_path)
    (tmp_path / "movies.dat").unlink()
    with pytest.raises(UserError, match=r"movies.dat: no such file"):
        imported("movielens", lambda folder: None, tmp_path)


def test_every_importer_has_settings_that_load() -> None:
    found = {load_settings(str(file)).import_events.dataset for file in CONFIGS.glob("*.yaml")}
    assert found == {"complete_journey", "movielens", "kuairand", "yambda", "taobao", "generic"}
