"""The study from a clean clone: what would cost a newcomer an hour, or a traceback after one."""

import re
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks import quality
from benchmarks.quality_study.arms import FEATURES, QUICK, UNMERGED
from benchmarks.quality_study.data import SCHEMAS, home, require
from benchmarks.quality_study.grid import grid
from benchmarks.quality_study.movielens import IN_PACKAGE
from longer.errors import UserError
from longer.schema import EventSchema
from longer.table_settings import GenerateSettings
from tests.data.logs import DAY_MS
from tests.data.tables import KEEP_ALL, publish_sequences

_HERE = Path(__file__).parents[2]
_SIZES = GenerateSettings()


def install_movielens(root: Path) -> Path:
    folder = root / "movielens" / IN_PACKAGE
    folder.mkdir(parents=True)
    for name in ("ml-100k.inter", "ml-100k.item"):
        (folder / name).write_text("")
    return folder


def publish_table(root: Path, schema: EventSchema) -> None:
    """Of one event."""
    features = {f.name: ["soap"] if f.kind == "categorical" else [1.0] for f in schema.features}
    columns = {
        "user_id": [1],
        "event_ts": [DAY_MS],
        "item_id": [7],
        "action": ["purchase"],
        "basket_id": [1],
        **features,
    }
    wanted = schema.events_arrow()
    events = pa.table({f.name: pa.array(columns[f.name]).cast(f.type) for f in wanted}, schema=wanted)
    publish_sequences(str(root / "tables/sequences"), events, schema, KEEP_ALL, num_buckets=1, row_group_events=50)


@pytest.mark.parametrize("processes", [[], ["--processes", "2"]])
def test_logs_that_are_not_there_are_all_told_with_what_makes_them_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, processes: list[str]
) -> None:
    where = [
        "--root",
        str(tmp_path / "none"),
        "--results",
        str(tmp_path / "results.jsonl"),
        "--cache",
        str(tmp_path / "c"),
    ]
    monkeypatch.setattr(sys, "argv", ["quality", "--log", "all", "--quick", *where, *processes])
    with pytest.raises(SystemExit) as exited:
        quality.main()
    table, ratings = capsys.readouterr().err.splitlines()
    assert exited.value.code == 2
    assert table.startswith(f"{tmp_path}/none/tables/sequences: ")
    for job in ("import_events", "build_sequences"):
        assert f"python -m jobs.{job} --config configs/quickstart.yaml --root {tmp_path}/none" in table
    assert ratings.startswith(f"{tmp_path}/none/movielens/{IN_PACKAGE}/ml-100k.inter: ")
    assert f"pip install --no-deps --target {tmp_path}/none/movielens recbole==1.2.1" in ratings
    assert not list(tmp_path.iterdir())


def test_a_half_installed_package_is_told_by_the_file_that_it_lacks(tmp_path: Path) -> None:
    (install_movielens(tmp_path) / "ml-100k.item").unlink()
    with pytest.raises(UserError, match=r"ml-100k\.item: not there"):
        require("movielens", str(tmp_path))


def test_a_table_of_another_schema_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    publish_table(tmp_path, SCHEMAS["generated"])
    with pytest.raises(UserError, match="another event_schema"):
        require("journey", str(tmp_path))


def test_one_root_holds_every_log_and_a_quickstart_that_goes_on_there_prepares_none_anew(tmp_path: Path) -> None:
    publish_table(tmp_path, SCHEMAS["journey"])
    install_movielens(tmp_path)

    def made_of() -> list[str]:
        return [quality._made_of(log, str(tmp_path), _SIZES) for log in sorted(SCHEMAS)]

    before = made_of()
    (tmp_path / "report.html").write_text("a later stage's")
    assert made_of() == before
    Path(home("movielens", str(tmp_path)), "ml-100k.item").write_text("other films")
    assert [name == other for name, other in zip(made_of(), before, strict=True)] == [True, True, False]


def test_the_readme_installs_movielens_where_the_study_reads_it_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    target = re.search(r"--target (\S+) recbole==1\.2\.1", (_HERE / "README.md").read_text())
    monkeypatch.setattr(sys, "argv", ["quality"])
    assert target
    assert home("movielens", quality._arguments().root) == f"{target[1]}/{IN_PACKAGE}"


@pytest.mark.parametrize("log", ["journey", "generated"])
def test_a_quick_page_is_of_more_than_longer_by_itself(log: str) -> None:
    """On ids it had LONGER alone, and of lengths, merging and queries nothing."""
    arms = {arm.name: arm for arm in grid(log, quick=True, seeds=3)}
    assert {"longer" + FEATURES, "none" + FEATURES, "longer", UNMERGED, "uniform queries"} <= set(arms)
    on_ids = {arm.encoder for arm in arms.values() if arm.group == "encoders" and not arm.features}
    assert len(on_ids - {"longer", "none"}) >= 3
    lengths = [arm.length for arm in arms.values() if arm.group == "lengths" and not arm.features]
    assert len(lengths) >= 2
    assert max(lengths) < QUICK[log].length


def test_quick_requests_of_the_generated_log_are_answered_in_its_longest_window_alone() -> None:
    """At every length LONGER had an AUC of .50: what it could have found was too little to be learned in these steps."""
    sizes, longest = quality._GENERATED_QUICK, QUICK["generated"].length
    shortest = min(arm.length for arm in grid("generated", quick=True, seeds=1) if arm.group == "lengths")
    period = sizes.num_events / sizes.num_users * sizes.period_days / sizes.num_days
    assert shortest < period / 2
    assert longest > 2 * period
    in_an_episode = period / sizes.period_days * sizes.episode_days
    assert sizes.long_range_share * in_an_episode > 10  # events of the cluster that is asked about


def test_make_bench_runs_the_study_small_and_names_benchmarks_that_are_there() -> None:
    """In full it has trials, and arms for hours of GPUs."""
    small = dict(re.findall(r"^SMALL_(\w+) := (.*)$", (_HERE / "Makefile").read_text(), re.MULTILINE))
    assert "--quick" in small["quality"].split()
    for name, arguments in small.items():
        script = (_HERE / "benchmarks" / f"{name}.py").read_text()
        assert all(f'"{flag}"' in script for flag in re.findall(r"--[\w-]+", arguments))
