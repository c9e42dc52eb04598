"""Requests of impressions are what their definition says, computed one impression at a time in plain Python."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import import_events, import_impressions
from longer.config import load_settings
from longer.data.batches import rows_of_requests, with_all_users
from longer.data.catalogue import first_seen
from longer.data.columns import histories_of, requests_of
from longer.data.impressions import MOST_SPAN_MS, requests_shown
from longer.data.sequences import KeepRule
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.hashing import stable_keys
from longer.schema import EventSchema
from tests.data.impressions import FIRST_MS, SHOP, events, impressions
from tests.data.tables import KEEP_ALL, publish_sequences, sequences_of

SHOWN = {"user": 1, "time": 10, "item": 5, "device": "phone", "page": 2.0, "click": 1.0, "like": 0.0, "watch_s": 7.0}


def rows_of(
    log: pa.Table, shown: list[dict[str, Any]], rule: KeepRule = KEEP_ALL, group_id: str | None = None
) -> list[dict]:
    sequences = sequences_of(log, SHOP, rule)
    asked = sequences_of(impressions(shown, group_id), SHOP.of_impressions(group_id), KeepRule(1 << 40, 4))
    users, histories = sequences["user_id"].combine_chunks(), histories_of(sequences, SHOP)
    made = requests_shown(asked, users, histories, first_seen(log, SHOP), SHOP, group_id)
    assert made.rows.schema == SHOP.requests_arrow()
    return made.rows.append_column("first_index", pa.array(made.first_index_R)).to_pylist()


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[tuple[int, int, int]], list[dict[str, Any]]]:
    """Few users, times and items, so that all of them meet; users without events, and requests at an event's very time."""
    users, times, items = st.integers(1, 4), st.integers(0, 6), st.integers(1, 5)
    happened = draw(st.lists(st.tuples(users, times, items), min_size=1, max_size=12))
    asked = draw(st.lists(st.tuples(users, times), min_size=1, max_size=5, unique=True))
    shown = []
    for user, time in asked:
        device = draw(st.sampled_from(["phone", "desktop", None]))
        for item in draw(st.lists(items, min_size=1, max_size=4)):
            labels = {task: draw(st.sampled_from([0.0, 1.0, None])) for task in SHOP.tasks}
            shown.append({"user": user, "time": time, "item": item, "device": device, "page": float(time), **labels})
    return happened, draw(st.permutations(shown))


@settings(deadline=None, max_examples=50)
@given(logs())
def test_a_history_ends_strictly_before_its_request_and_what_was_logged_comes_with_it(
    log: tuple[list[tuple[int, int, int]], list[dict[str, Any]]],
) -> None:
    happened, shown = log
    expected = defaultdict(list)
    for row in shown:
        expected[row["user"], row["time"]].append(row)
    found = rows_of(events(happened), shown)
    assert [(row["user_id"], row["request_ts"].timestamp() * 1000 - FIRST_MS) for row in found] == sorted(expected)
    for row in found:
        user, time = row["user_id"], int(row["request_ts"].timestamp() * 1000) - FIRST_MS
        assert row["history_end"] == sum(u == user and t < time for u, t, _ in happened)
        rows = expected[user, time]
        assert (row["device"], row["page"]) == (rows[0]["device"], rows[0]["page"])
        candidates = zip(row["item_id"], row["category"], *(row[task] for task in SHOP.tasks), strict=True)
        largest = {item: [max(r[t] or 0.0 for r in rows if r["item"] == item) for t in SHOP.tasks] for item in
                   {r["item"] for r in rows}}  # fmt: skip
        assert sorted(candidates) == sorted((item, f"c{item % 3}", *labels) for item, labels in largest.items())


def test_impressions_of_one_group_are_one_request_of_its_earliest_time_and_that_ones_features() -> None:
    later = {**SHOWN, "time": 30, "item": 6, "page": 9.0}
    groups = [{**SHOWN, "group": 1}, {**later, "group": 1}, {**SHOWN, "item": 8, "group": 2}]
    found = rows_of(events([(1, 20, 3)]), groups, group_id="view")
    assert sorted((sorted(row["item_id"]), row["page"], row["history_end"]) for row in found) == [
        ([5, 6], 2.0, 0),
        ([8], 2.0, 0),
    ]


def test_an_item_that_is_logged_as_shown_and_as_clicked_is_one_candidate_with_both_rows_labels() -> None:
    """Two would have contradictory labels, and the log's order would tell which is which."""
    seen = {**SHOWN, "click": 0.0, "like": None, "watch_s": -2.0, "category": None}
    clicked = {**SHOWN, "time": 12, "click": 1.0, "like": None, "watch_s": None, "category": "late"}
    for rows in ([seen, clicked], [clicked, seen]):
        (found,) = rows_of(events([(1, 1, 3)]), [{**row, "group": 1} for row in rows], group_id="view")
        labels = {name: found[name] for name in ("item_id", "category", *SHOP.tasks)}
        assert labels == {"item_id": [5], "category": ["late"], "click": [1.0], "like": [0.0], "watch_s": [-2.0]}


def test_a_feature_that_an_impression_lacks_is_the_catalogue_s_as_it_is_where_the_item_is_scored_by_id() -> None:
    shown = [{**SHOWN, "item": item, "category": None} for item in (3, 4)] + [{**SHOWN, "category": "own"}]
    (found,) = rows_of(events([(1, 1, 3), (1, 2, 5)]), shown)
    assert dict(zip(found["item_id"], found["category"], strict=True)) == {3: "c0", 4: None, 5: "own"}


def test_a_feature_of_a_request_is_what_the_earliest_of_its_impressions_that_has_it_says() -> None:
    rows = [{"device": None, "page": 1.0}, {"device": "desktop", "page": None}, {"device": "phone", "page": 3.0}]
    shown = [{**SHOWN, **row, "time": time, "item": 9 - time, "group": 1} for time, row in enumerate(rows)]
    (found,) = rows_of(events([(1, 1, 3)]), shown, group_id="view")
    assert (found["device"], found["page"]) == ("desktop", 1.0)
    (nothing,) = rows_of(events([(1, 1, 3)]), [{**SHOWN, "device": None, "page": None}])
    assert (nothing["device"], nothing["page"]) == (None, None)


def test_an_id_that_a_user_s_later_session_has_again_is_refused() -> None:
    """What is shown days later, as it is then, would be a candidate of a request of days before."""
    shown = [{**SHOWN, "time": time, "item": time % 7, "group": 1} for time in (0, MOST_SPAN_MS)]
    (found,) = rows_of(events([(1, 1, 3)]), shown, group_id="view")
    assert len(found["item_id"]) == 2
    shown += [{**SHOWN, "user": 2, "group": 1}, {**SHOWN, "time": MOST_SPAN_MS + 1, "group": 1}]
    with pytest.raises(
        UserError, match=r"group_id: 1 of 2 requests .* one user and one view that are up to 24 hours apart"
    ):
        rows_of(events([(1, 1, 3)]), shown, group_id="view")


def test_a_request_before_all_events_that_the_table_keeps_is_known_to_be_cut() -> None:
    """What came before the first event kept is not known: its place among those may be after the request."""
    log = events([(1, time, 3) for time in range(20)])
    (found,) = rows_of(log, [{**SHOWN, "time": 2}], KeepRule(4, 4))
    assert found["first_index"] == found["history_end"] == 16


def test_the_order_of_candidates_says_nothing_of_the_log_s_order() -> None:
    shown = [{**SHOWN, "item": item} for item in range(1, 30)]
    (found,), (back,) = (rows_of(events([(1, 1, 3)]), rows) for rows in (shown, shown[::-1]))
    assert found["item_id"] == back["item_id"] != sorted(found["item_id"])


def test_a_user_who_has_done_nothing_has_an_empty_history_and_not_another_user_s() -> None:
    log = events([(1, 1, 3), (3, 1, 4)])
    sequences = sequences_of(log, SHOP)
    rows = rows_of(log, [{**SHOWN, "user": user} for user in (1, 2, 3, 4)])
    requests = requests_of(
        pa.Table.from_pylist(rows).select(SHOP.requests_arrow().names).cast(SHOP.requests_arrow()), SHOP
    )
    histories = with_all_users(histories_of(sequences, SHOP), requests.user_key_R)
    row_R = rows_of_requests(histories, requests)
    np.testing.assert_array_equal(histories.user_key_B[row_R], stable_keys(pa.array([1, 2, 3, 4])))
    assert np.diff(histories.offsets_B1)[row_R].tolist() == [1, 0, 1, 0]


def test_a_column_of_impressions_that_the_schema_lacks_is_named() -> None:
    overrides = {
        "event_schema": SHOP.model_dump(mode="json"),
        "import_impressions": {"source": "log", "columns": {"devise": "d"}},
    }
    with pytest.raises(UserError, match=r"import_impressions.columns.devise: .*device, page, click, like, watch_s"):
        load_settings(overrides=overrides)


@pytest.mark.parametrize("name", ["user_id", "event_ts", "view_id", "watch_s"])
def test_a_column_without_which_no_impression_is_of_use_cannot_be_left_out(name: str) -> None:
    asked = {"source": "log", "group_id": "view_id", "columns": {name: None}}
    overrides = {"event_schema": SHOP.model_dump(mode="json"), "import_impressions": asked}
    problem = rf"import_impressions.columns.{name} is null: .*only features can be \(category, device, page\)"
    with pytest.raises(UserError, match=problem):
        load_settings(overrides=overrides)


def test_a_log_of_impressions_without_a_column_of_an_items_feature_is_imported(tmp_path: Path) -> None:
    """Of such rows the request table has the catalogue's value."""
    pq.write_table(impressions([SHOWN]).drop_columns(["action", "category"]), tmp_path / "a.parquet")
    overrides = {
        "root": str(tmp_path / "root"),
        "event_schema": SHOP.model_dump(mode="json"),
        "import_impressions": {"source": f"{tmp_path}/a.parquet"},
        "train": {"tasks": [{"name": "click"}]},
    }
    with pytest.raises(UserError, match=r"no column 'category' .*'category: null'"):
        import_events.run(load_settings(overrides=overrides).of_impressions(2))
    overrides["import_impressions"]["columns"] = {"category": None}
    version = import_events.run(load_settings(overrides=overrides).of_impressions(2))
    assert ds.dataset(version.files()).to_table(columns=["item_id", "category", "device"]).to_pylist() == [
        {"item_id": 5, "category": None, "device": "phone"}
    ]


def test_a_bucket_none_of_whose_users_has_done_anything_has_requests_all_the_same() -> None:
    nobody = sequences_of(events([(1, 1, 3)]), SHOP).slice(0, 0)
    shown = sequences_of(impressions([SHOWN]), SHOP.of_impressions(None), KeepRule(1 << 40, 4))
    users, catalogue = nobody["user_id"].combine_chunks(), first_seen(events([(1, 1, 3)]), SHOP)
    made = requests_shown(shown, users, histories_of(nobody, SHOP), catalogue, SHOP, None)
    assert made.rows.select(["user_id", "history_end", "device", "watch_s"]).to_pylist() == [
        {"user_id": 1, "history_end": 0, "device": "phone", "watch_s": [7.0]}
    ]


def test_a_mistake_in_the_log_of_impressions_is_told_with_its_own_settings_and_the_path_as_it_is(
    tmp_path: Path,
) -> None:
    logs = tmp_path / "import_events_of_ours"
    overrides = {
        "root": str(tmp_path / "root"),
        "event_schema": SHOP.model_dump(mode="json"),
        "import_impressions": {"source": str(logs)},
        "train": {"tasks": [{"name": "click"}]},
    }
    settings = load_settings(overrides=overrides)
    publish_sequences(settings.path("tables", "sequences"), events([(1, 1, 3)]), SHOP, KEEP_ALL, 2, 99)
    with pytest.raises(UserError, match=rf"^import_impressions\.source: {logs}: no log there"):
        import_impressions.run(settings)
    logs.mkdir()
    (logs / "a.csv").write_text("user_id,item_id\n1,2\n")
    with pytest.raises(UserError, match=rf"{logs}/a\.csv: no column .*--import_impressions\.skip_unreadable_files"):
        import_impressions.run(settings)
    with pytest.raises(UserError, match=r"another event_schema: .*run `python -m jobs\.import_impressions`"):
        SequenceTable(settings.path("tables", "sequences"), EventSchema(), job="jobs.import_impressions")
