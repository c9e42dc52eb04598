"""The three jobs on a real local Ray: what they build, that a rerun changes nothing, and one line for each bad input."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs import build_requests, build_sequences, import_events
from longer.config import Settings, load_settings
from longer.data.tables import RequestTable, SequenceTable
from longer.errors import UserError
from longer.runner import user_error_in
from tests.data.logs import generated_log, naive_sequences
from tests.data.test_tables import check_user

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
EVENTS = generated_log(num_users=12, num_days=30, seed=3)


def settings_of(root: Path, events: pa.Table = EVENTS, **sections: dict) -> Settings:
    """Settings of a small run whose source holds `events` as the two files of the Complete Journey."""
    source = root / "source"
    source.mkdir(exist_ok=True)
    products = events.group_by("item_id").aggregate([("category", "max")])
    columns = {
        "household_id": events["user_id"],
        "basket_id": events["basket_id"],
        "product_id": events["item_id"],
        "quantity": events["quantity"],
        "sales_value": events["quantity"],
        "transaction_timestamp": events["event_ts"],
    }
    pq.write_table(pa.table(columns), source / "transactions.parquet")
    features = {"product_category": products["category_max"], "department": products["category_max"]}
    pq.write_table(pa.table({"product_id": products["item_id"], **features}), source / "products.parquet")
    return load_settings(
        overrides={
            "root": str(root / "run"),
            "event_schema": {
                "group_id": "basket_id",
                "features": [
                    {"name": "category", "kind": "categorical", "of": "item"},
                    {"name": "quantity", "kind": "numeric", "of": "event"},
                ],
            },
            "import_events": {"source": str(source), **sections.get("import_events", {})},
            "model": {"history_events": 16, "merge_size": 2, "query_groups": 4, "stride_groups": 2},
            "sequences": {
                "num_buckets": 4,
                "keep_events": 200,
                "row_group_events": 50,
                **sections.get("sequences", {}),
            },
            "requests": {"negatives_per_positive": 2, **sections.get("requests", {})},
        }
    )


def run_all(settings: Settings) -> list:
    return [job.run(settings) for job in (import_events, build_sequences, build_requests)]


def test_tables_equal_their_definition_and_a_rerun_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = settings_of(tmp_path)
    schema = settings.event_schema
    versions = run_all(settings)
    table = SequenceTable(settings.path("tables", "sequences"), schema)
    expected = naive_sequences(EVENTS, schema, 200, 4)
    for row in expected:
        check_user(table.get([row["user_id"]]), 0, row)
    assert versions[1].manifest["num_events"] == len(EVENTS)
    asked = RequestTable(settings.path("tables", "requests"), schema)
    counts = {split: sum(len(asked.read(split, b)) for b in range(4)) for split in ("train", "valid", "test")}
    assert counts == versions[2].manifest["num_requests"]
    assert sum(counts.values()) == len(pc.unique(EVENTS["basket_id"]))

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.parquet")}
    capsys.readouterr()
    assert [version.manifest for version in run_all(settings)] == [version.manifest for version in versions]
    assert capsys.readouterr().err.count("already built, nothing changed") == 3
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.parquet")} == before


def test_a_cut_window_fails_past_the_share_and_leaves_the_last_version(tmp_path: Path) -> None:
    versions = run_all(settings_of(tmp_path))
    short = settings_of(tmp_path, sequences={"keep_events": 20})
    build_sequences.run(short)
    with pytest.raises(
        UserError, match=r"sequences.keep_events=20: \d+ of \d+ requests have a history window"
    ) as caught:
        build_requests.run(short)
    assert "\n" not in str(caught.value)
    published = {path.parent.name for path in (tmp_path / "run/tables/requests").rglob("_MANIFEST.json")}
    assert published == {path.name for path in (tmp_path / "run/tables/requests").iterdir() if path.is_dir()}
    assert published == {versions[2].id}
    allowed = build_requests.run(settings_of(tmp_path, sequences={"keep_events": 20}, requests={"max_cut_share": 1.0}))
    assert allowed.manifest["num_cut"] > 0
    kept = naive_sequences(EVENTS, short.event_schema, 20, 4)
    assert allowed.manifest["num_rows"] + allowed.manifest["num_cut"] == sum(len(set(r["basket_id"])) for r in kept)
    assert allowed.manifest["num_events_not_kept"] == len(EVENTS) - sum(len(row["item_id"]) for row in kept)


def test_an_unreadable_event_file_is_named_or_skipped_when_told(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    events = import_events.run(settings)
    Path(events.files()[3]).write_bytes(b"PAR1 no longer")
    with pytest.raises(UserError, match=r"dt=2016-07-21/part-\S+.parquet: not a readable Parquet file"):
        build_sequences.run(settings)
    skipping = settings_of(tmp_path, sequences={"skip_unreadable_files": True})
    assert build_sequences.run(skipping).manifest["num_skipped_files"] == 1


def test_a_file_damaged_inside_is_named_from_the_task_that_read_it(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    damaged = Path(import_events.run(settings).files()[5])
    content = bytearray(damaged.read_bytes())
    content[4 : len(content) // 3] = bytes(len(content) // 3 - 4)
    damaged.write_bytes(content)
    with pytest.raises(Exception, match="damaged inside") as caught:
        build_sequences.run(settings)
    mistake = user_error_in(caught.value)
    assert str(mistake).startswith(str(damaged))
    assert "\n" not in str(mistake)
    assert not list((tmp_path / "run/tables/sequences").glob("*")), "something half-written was left"
    skipping = settings.sequences.model_copy(update={"skip_unreadable_files": True})
    partial = build_sequences.run(settings.model_copy(update={"sequences": skipping}))
    assert partial.manifest["num_skipped_files"] == 1


def test_unfit_rows_past_the_share_and_an_empty_log_are_one_line_each(tmp_path: Path) -> None:
    holes = pa.array([None] * 50 + EVENTS["user_id"].to_pylist()[50:], pa.int64())
    torn = EVENTS.set_column(0, "user_id", holes)
    (tmp_path / "torn").mkdir()
    with pytest.raises(UserError, match=r"50 of \d+ rows are unfit, 50 of them: null user_id"):
        import_events.run(settings_of(tmp_path / "torn", torn, import_events={"max_quarantined_share": 0.001}))
    assert (
        import_events.run(settings_of(tmp_path / "torn", torn, import_events={"max_quarantined_share": 0.5})).manifest[
            "num_quarantined"
        ]
        == 50
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the log has no events"):
        import_events.run(settings_of(tmp_path / "empty", EVENTS.slice(0, 0)))


def test_an_import_killed_between_its_two_tables_goes_on_when_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(import_events, "write_events", killed)
        with pytest.raises(KeyboardInterrupt):
            import_events.run(settings)
    assert import_events.run(settings).manifest["num_rows"] == len(EVENTS)


def test_a_refused_import_gives_its_reason_every_time(tmp_path: Path) -> None:
    holes = pa.array([None] * 50 + EVENTS["user_id"].to_pylist()[50:], pa.int64())
    settings = settings_of(
        tmp_path, EVENTS.set_column(0, "user_id", holes), import_events={"max_quarantined_share": 0.001}
    )
    for _ in range(3):
        with pytest.raises(UserError, match=r"50 of \d+ rows are unfit"):
            import_events.run(settings)
