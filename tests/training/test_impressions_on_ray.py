"""From logs of events and of impressions to scores of three tasks, by the jobs alone, on a real local Ray."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from ray import serve

from jobs import (
    batch_score,
    build_requests,
    build_sequences,
    evaluate,
    import_events,
    import_impressions,
    serve_check,
    train,
    verify,
)
from longer.config import Settings, load_settings
from longer.data.events import iso_time
from longer.data.tables import RequestTable
from longer.errors import UserError
from longer.training.continuous import requests_end
from tests.data.impressions import FIRST_MS, SHOP, impressions, shop_log
from tests.data.logs import DAY_MS

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

NUM_USERS, NUM_DAYS = 40, 12
TASKS = [{"name": "click"}, {"name": "like", "weight": 0.5}, {"name": "watch_s", "kind": "regression", "weight": 0.1}]


def write(folder: Path, name: str, table: pa.Table, renamed: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    columns = [renamed.get(column, column) for column in table.column_names]
    pq.write_table(table.rename_columns(columns), folder / name)


def settings_of(logs: Path, **sections: Any) -> Settings:
    overrides = {
        "root": str(logs / "run"),
        "event_schema": SHOP.model_dump(mode="json"),
        "import_events": {"dataset": "generic", "source": str(logs / "events")},
        "import_impressions": {
            "source": str(logs / "shown"),
            "columns": {"event_ts": "shown_at", "watch_s": "seconds"},
        },
        "sequences": {"num_buckets": 3},
        "model": {
            "history_events": 16,
            "merge_size": 2,
            "query_groups": 4,
            "stride_groups": 2,
            "num_heads": 2,
            "event_width": 8,
        },
        "train": {
            "tasks": TASKS,
            "num_workers": 1,
            "epochs": 2,
            "tokens_per_step": 300,
            "learning_rate": 0.02,
            "embedding_learning_rate": 0.05,
            "validate_every_steps": 100,
        },
        "requests": {"test_days_share": 0.2, "validation_days_share": 0.1},
        "batch_score": {"concurrency": (1, 1)},
        "serve": {"check_requests": 20},
    }
    return load_settings(overrides={**overrides, **sections})


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("shop")
    happened, shown = shop_log(NUM_USERS, NUM_DAYS, seed=1)
    write(root / "events", "all.parquet", happened, {})
    write(
        root / "shown",
        "all.parquet",
        impressions(shown).drop_columns("action"),
        {"event_ts": "shown_at", "watch_s": "seconds"},
    )
    return root, shown


def test_features_of_requests_and_labels_of_several_tasks_get_from_the_log_to_scores(
    logged: tuple[Path, list[dict[str, Any]]], capsys: pytest.CaptureFixture
) -> None:
    """Takes long: every job is run. Clicks are told by the device alone, likes by the page: without them, the AUC is a half."""
    root, shown = logged
    settings = settings_of(root)
    for job in (import_events, build_sequences, import_impressions):
        job.run(settings)
    requests = build_requests.run(settings)
    assert not verify.run(settings).found.counts
    last_ms = pc.max(pq.read_table(root / "events")["event_ts"].cast(pa.int64())).as_py()
    due = [row for row in shown if FIRST_MS + row["time"] <= last_ms]
    assert requests.manifest["num_later"] == (len(shown) - len(due)) / 4
    assert sum(requests.manifest["num_candidates"].values()) == len(due)
    checkpoint = train.run(settings)
    assert {"auc", "logloss"} <= checkpoint.manifest["validation"]["like"].keys()
    capsys.readouterr()
    other_order = settings.train.model_copy(update={"tasks": settings.train.tasks[::-1]})
    reordered = settings.model_copy(
        update={"train": other_order}
    )  # what has scored is the model, whatever is set since
    evaluated = evaluate.run(reordered)
    told = capsys.readouterr().err
    by_task = evaluated.manifest["test_by_task"]
    for task in ("click", "like", "watch_s"):
        assert f"{task}: " in told, "a task's metrics are not told"
    assert by_task["click"]["auc"] > 0.95
    assert by_task["like"]["auc"] > 0.9
    seconds = np.array([row["watch_s"] or 0.0 for row in due])
    assert by_task["watch_s"]["mse"] < 0.5 * seconds.var()
    batch_score.run(reordered)  # which sends some of its requests through the serving path, and fails if scores differ
    try:  # over HTTP, with what was logged
        assert serve_check.run(reordered).manifest["max_abs_diff_vs_offline"] < 1e-5
    finally:
        serve.shutdown()
    capsys.readouterr()
    assert import_impressions.run(settings).id == import_impressions.run(settings, since_last=True).id
    assert build_requests.run(settings).id == requests.id


def test_impressions_of_a_new_day_become_requests_and_the_old_ones_stay_the_same(tmp_path: Path) -> None:
    """Though they come later than the events of their day."""
    happened, shown = shop_log(9, 4, seed=2)
    settings = settings_of(tmp_path)
    is_new = pc.greater_equal(happened["event_ts"].cast(pa.int64()), FIRST_MS + 3 * DAY_MS)
    logs = {day: [row for row in shown if (row["time"] >= 3 * DAY_MS) == day] for day in (False, True)}
    built, until = [], []
    days = {False: happened.filter(pc.invert(is_new)), True: happened.filter(is_new)}
    names = {"event_ts": "shown_at", "watch_s": "seconds"}
    for day, has_events, has_shown in ((0, True, True), (1, True, False), (1, False, True)):
        if has_events:
            write(tmp_path / "events", f"{day}.parquet", days[bool(day)], {})
        if has_shown:
            write(tmp_path / "shown", f"{day}.parquet", impressions(logs[bool(day)]).drop_columns("action"), names)
        for job in (import_events, build_sequences, import_impressions):
            job.run(settings, since_last=bool(day))
        until.append(requests_end(build_requests.run(settings)))
        table = RequestTable(settings.path("tables", "requests"), SHOP)
        rows = [table.rows(split, bucket) for split in ("train", "valid", "test") for bucket in range(3)]
        built.append({row["request_id"]: row for row in pa.concat_tables(rows).to_pylist()})
    first, waiting, both = built
    assert waiting.items() >= first.items()
    new = [row["request_ts"].isoformat() for request_id, row in both.items() if request_id not in waiting]
    assert new
    assert until[1] < min(new)  # what came late is not taken for trained by a model that was trained meanwhile
    assert {request_id: both[request_id] for request_id in first} == first
    assert sum(len(row["item_id"]) for row in both.values()) > sum(len(row["item_id"]) for row in first.values())


def damaged(path: Path, change: Callable[[dict[str, list]], None]) -> None:
    """A file of requests, other than it was built."""
    rows = pq.read_table(path, partitioning=None)
    columns = rows.to_pydict()
    change(columns)
    pq.write_table(pa.table(columns, schema=rows.schema), path)


def flip_a_label(columns: dict[str, list]) -> None:
    columns["click"][0][0] = 1.0 - columns["click"][0][0]


def move_a_candidate(columns: dict[str, list]) -> None:
    for name in ("item_id", "category", *SHOP.tasks):
        columns[name][1].append(columns[name][0].pop())


def take_a_later_feature(columns: dict[str, list]) -> None:
    later = next(row for row, page in enumerate(columns["page"]) if page != columns["page"][0])
    columns["page"][0] = columns["page"][later]


def end_a_history_later(columns: dict[str, list]) -> None:
    columns["history_end"][0] += 1


def lose_a_request(columns: dict[str, list]) -> None:
    for values in columns.values():
        del values[0]


def rename_a_category(columns: dict[str, list]) -> None:
    columns["category"][0][0] += "!"


def change_an_id(columns: dict[str, list]) -> None:
    columns["request_id"][0] ^= 1


DAMAGES = {
    flip_a_label: {"label": 1},
    move_a_candidate: {"candidates": 2},
    rename_a_category: {"candidate_feature": 1},
    take_a_later_feature: {"request_feature": 1},
    end_a_history_later: {"future_event": 1},
    lose_a_request: {"lost_request": 1},
    change_an_id: {"unknown_request": 1, "lost_request": 1},
}
OF_THE_FILES = {"checksum", "file_size", "row_count"}
"""What shows too that a file was written anew, and that it counts otherwise than its manifest."""


def test_what_a_table_says_otherwise_than_its_impressions_is_found_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Impressions cover the last days of the events only."""
    happened, shown = shop_log(9, 6, seed=3)
    shown = [row for row in shown if row["time"] >= 3 * DAY_MS]
    write(tmp_path / "events", "all.parquet", happened, {})
    names = {"event_ts": "shown_at", "watch_s": "seconds"}
    write(tmp_path / "shown", "all.parquet", impressions(shown).drop_columns("action"), names)
    settings = settings_of(tmp_path)
    for job in (import_events, build_sequences):
        job.run(settings)
    capsys.readouterr()
    import_impressions.run(settings)
    told = capsys.readouterr().err
    assert "import_impressions: version" in told
    assert f"{len(shown)} impressions kept" in told
    assert "build_sequences" not in told
    assert " events" not in told
    requests = build_requests.run(settings)
    num_requests = requests.manifest["num_requests"]
    assert requests.manifest["valid_from"] == iso_time(FIRST_MS + 4 * DAY_MS)  # days of impressions, not of events
    assert requests.manifest["test_from"] == iso_time(FIRST_MS + 5 * DAY_MS)
    assert all(num_requests.values())
    assert not verify.run(settings).found.counts
    file = next(Path(requests.path).glob("split=train/bucket=*/part-0.parquet"))
    whole = file.read_bytes()
    for damage, due in DAMAGES.items():
        damaged(file, damage)
        found = verify.run(settings).found
        assert {kind: n for kind, n in found.counts.items() if kind not in OF_THE_FILES} == due, damage
        assert all("request " in text for kind in due for text in found.shown[kind])
        file.write_bytes(whole)
    shutil.rmtree(settings.path("impressions"))
    assert verify.run(settings).found.counts == {"impressions_version": 1}


def test_a_table_with_more_than_events_can_tell_asks_for_a_log_of_impressions(
    logged: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    root, _ = logged
    settings = settings_of(root, root=str(tmp_path), import_impressions={})
    for job in (import_events, build_sequences):
        job.run(settings)
    with pytest.raises(UserError, match=r"like, watch_s, device, page: .*import_impressions\.source"):
        build_requests.run(settings)
    unread = settings_of(root, root=str(tmp_path))
    with pytest.raises(UserError, match=r"no impressions yet: run `python -m jobs.import_impressions`"):
        build_requests.run(unread)
    lost = settings_of(root, root=str(tmp_path), import_impressions={"source": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match=r"import_impressions\.source: .*nowhere"):
        import_impressions.run(lost)
