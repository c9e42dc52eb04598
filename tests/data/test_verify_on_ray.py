"""jobs.verify on a real local Ray: clean tables pass, and what only files and manifests can show is found and printed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import build_requests, build_sequences, verify
from longer.config import Settings
from longer.errors import UserError
from longer.storage import Version
from tests.data import test_increments as increments
from tests.data.logs import log
from tests.data.test_build_on_ray import run_all, settings_of
from tests.test_runner import run_python

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> tuple[Path, list[Version]]:
    root = tmp_path_factory.mktemp("built")
    return root, run_all(settings_of(root))


@pytest.fixture
def own(built: tuple[Path, list[Version]], tmp_path: Path) -> tuple[Settings, Path, Path]:
    """Settings of a copy to damage, and the folders of its sequence and request versions."""
    shutil.copytree(built[0] / "run", tmp_path / "run")
    _, sequences, requests = built[1]
    tables = tmp_path / "run/tables"
    return settings_of(tmp_path), tables / "sequences" / sequences.id, tables / "requests" / requests.id


def files_of(version: Path) -> list[Path]:
    return sorted(version.rglob("*.parquet"))


def edit_manifest(version: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((version / "_MANIFEST.json").read_text())
    change(manifest)
    (version / "_MANIFEST.json").write_text(json.dumps(manifest))


def repeat_a_request(version: Path) -> None:
    """The first request of a bucket, once more in another bucket's file."""
    one, other = (version / f"split=train/bucket=000{bucket}/part-0.parquet" for bucket in (0, 1))
    rows = pq.read_table(one, partitioning=None)
    pq.write_table(pa.concat_tables([pq.read_table(other, partitioning=None), rows.slice(0, 1)]), other)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def allow_cut(manifest: dict, num_cut: int) -> None:
    manifest["settings"]["max_cut_share"] = 1.0
    manifest["num_cut"] = num_cut


def without_statistics(file: Path) -> None:
    pq.write_table(pq.read_table(file, partitioning=None), file, write_statistics=False)


PLANTED: dict[str, Callable[[Path, Path], object]] = {
    "missing_file": lambda s, r: os.remove(files_of(s)[1]),
    "file_size": lambda s, r: files_of(r)[0].write_bytes(files_of(r)[0].read_bytes() + b"x"),
    "checksum": lambda s, r: flip_a_bit(files_of(s)[0]),
    "row_count": lambda s, r: edit_manifest(s, lambda m: m.update(num_events=m["num_events"] + 1)),
    "row_count of a split": lambda s, r: edit_manifest(r, lambda m: m["num_candidates"].update(test=1)),
    "row_count of a bucket": lambda s, r: edit_manifest(s, lambda m: m["buckets"][0].update(num_events=1)),
    "row_count of users": lambda s, r: edit_manifest(s, lambda m: m.update(num_users=1)),
    "row_count of cut requests": lambda s, r: edit_manifest(r, lambda m: allow_cut(m, num_cut=77)),
    "manifest (the share of cut requests)": lambda s, r: edit_manifest(r, lambda m: m.update(num_cut=77)),
    "manifest (buckets)": lambda s, r: edit_manifest(r, lambda m: m.update(num_buckets=7)),
    "manifest (watermark)": lambda s, r: edit_manifest(s, lambda m: m.update(watermark="2036-01-01T00:00:00+00:00")),
    "manifest (no time)": lambda s, r: edit_manifest(s, lambda m: m.update(watermark="soon")),
    "manifest (first event)": lambda s, r: edit_manifest(s, lambda m: m.update(first_event_ts=m["watermark"])),
    "manifest (watermark of requests)": lambda s, r: edit_manifest(r, lambda m: m.update(watermark="")),
    "manifest (split)": lambda s, r: edit_manifest(r, lambda m: m["settings"].update(test_days_share=0.5)),
    "statistics": lambda s, r: without_statistics(files_of(s)[0]),
    "sequence_version": lambda s, r: edit_manifest(r, lambda m: m["inputs"].update(sequences="0123456789ab")),
    "duplicate_request": lambda s, r: repeat_a_request(r),
}


def test_tables_that_the_jobs_built_are_clean_and_the_counts_are_printed(
    own: tuple[Settings, Path, Path], built: tuple[Path, list[Version]], capsys: pytest.CaptureFixture[str]
) -> None:
    report = verify.run(own[0])
    assert (report.found.counts, report.noted.counts) == ({}, {})
    _, sequences, requests = (version.manifest for version in built[1])
    assert report.checked["users"] == sequences["num_rows"]
    assert report.checked["requests"] == requests["num_rows"]
    assert report.checked["bytes"] == sequences["num_bytes"] + requests["num_bytes"]
    printed = capsys.readouterr().err
    assert f"{requests['num_rows']} requests" in printed
    assert printed.splitlines()[-1] == "verify: no violation"


@pytest.mark.parametrize("planted", PLANTED)
def test_what_a_file_or_a_manifest_hides_is_found_and_named(
    own: tuple[Settings, Path, Path], planted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, sequences, requests = own
    PLANTED[planted](sequences, requests)
    kind = planted.split(" ")[0]
    assert kind in verify.run(settings).found.counts
    assert f"verify:   {kind}: " in capsys.readouterr().err


def test_the_version_that_the_requests_name_is_verified_though_a_newer_one_is_served(
    own: tuple[Settings, Path, Path],
) -> None:
    settings, sequences, _ = own
    newer = settings.model_copy(update={"sequences": settings.sequences.model_copy(update={"row_group_events": 3})})
    version = build_sequences.run(newer)
    assert version.id != sequences.name
    assert verify.run(settings).found.counts == {}
    pinned = settings.verify.model_copy(update={"sequences_version": version.id})
    assert verify.run(settings.model_copy(update={"verify": pinned})).found.counts == {"sequence_version": 1}
    unknown = settings.verify.model_copy(update={"requests_version": "v9"})
    with pytest.raises(UserError, match="version v9 is not in this table"):
        verify.run(settings.model_copy(update={"verify": unknown}))


def test_news_beside_the_rows_are_verified_as_readers_see_them(tmp_path: Path) -> None:
    chosen = increments.settings_of(tmp_path, keep_events=1000, merge_share=10.0)
    first = increments.add_events(chosen, log([(user, day, 1, 1) for user in range(1, 9) for day in range(20)]), None)
    build_sequences.run(chosen)
    news = log([(user, day, 2, 1) for user in (3, 4, 20, 21) for day in (19, 20, 21)])
    increments.add_events(chosen, news, first)
    sequences = build_sequences.run(chosen, since_last=True)
    assert sequences.files("news/")
    requests = build_requests.run(chosen)
    report = verify.run(chosen)
    assert report.found.counts == {}
    assert (report.checked["users"], report.checked["events"]) == (10, 8 * 20 + len(news))
    for path in requests.files("split=test/"):
        rows = pq.read_table(path, partitioning=None)
        ahead = pa.compute.add(rows["history_end"], 1)
        pq.write_table(rows.set_column(rows.column_names.index("history_end"), "history_end", ahead), path)
    assert verify.run(chosen).found.counts["future_event"] > 0


def test_tables_of_ones_own_without_a_manifest_are_verified(own: tuple[Settings, Path, Path], tmp_path: Path) -> None:
    settings, sequences, requests = own
    for folder in (sequences, requests):
        os.remove(folder / "_MANIFEST.json")
    chosen = {"sequences": str(sequences), "requests": str(requests)}
    mine = settings.model_copy(update={"root": str(tmp_path / "elsewhere"), "verify": verify_settings(**chosen)})
    assert verify.run(mine).found.counts == {}
    file = files_of(requests)[-1]
    rows = pq.read_table(file, partitioning=None)
    ahead = pa.compute.add(rows["history_end"], 1)
    pq.write_table(rows.set_column(rows.column_names.index("history_end"), "history_end", ahead), file)
    found = verify.run(mine).found
    assert found.counts["future_event"] + found.counts["history_range"] == len(rows)
    assert f"request {rows['request_id'][0].as_py()}: " in found.shown["future_event"][0]


def test_tables_of_ones_own_in_no_buckets_are_verified_by_user_over_the_whole_table(
    own: tuple[Settings, Path, Path], tmp_path: Path
) -> None:
    settings, sequences, requests = own
    for name, folder in (("sequences", sequences), ("requests", requests)):
        (tmp_path / "mine" / name).mkdir(parents=True)
        rows = pa.concat_tables([pq.read_table(file, partitioning=None) for file in files_of(folder)])
        pq.write_table(rows.sort_by("user_id"), tmp_path / "mine" / name / "all.parquet", row_group_size=40)
    chosen = {name: str(tmp_path / "mine" / name) for name in ("sequences", "requests")}
    no_buckets = settings.sequences.model_copy(update={"num_buckets": None})
    mine = settings.model_copy(update={"sequences": no_buckets, "verify": verify_settings(**chosen)})
    report = verify.run(mine)
    assert report.found.counts == {}
    assert report.checked["requests of all"] == report.checked["requests"] > 0
    mixed = verify_settings(**(chosen | {"sequences": str(sequences.parent)}))
    with pytest.raises(
        UserError, match=r"mine/requests: lies in no buckets, but .*: put both under bucket=NNNN/, or neither"
    ):
        verify.run(mine.model_copy(update={"verify": mixed}))


def test_windows_that_the_table_cut_are_counted_as_the_manifest_counts_them(tmp_path: Path) -> None:
    asked = {"sequences": {"keep_events": 20}, "requests": {"max_cut_share": 1.0}}
    settings = settings_of(tmp_path, **asked)
    _, _, requests = run_all(settings)
    assert requests.manifest["num_cut"] > 0
    assert verify.run(settings).found.counts == {}


def verify_settings(**chosen: str) -> object:
    return Settings(verify=chosen).verify  # type: ignore[arg-type]


def test_without_a_request_table_the_sequences_are_verified_alone(own: tuple[Settings, Path, Path]) -> None:
    settings, _, requests = own
    shutil.rmtree(requests.parent)
    report = verify.run(settings)
    assert report.found.counts == {}
    assert report.checked["users"] > 0
    assert report.checked["requests"] == 0


def test_a_request_table_that_lost_its_manifest_is_not_taken_for_none(own: tuple[Settings, Path, Path]) -> None:
    settings, _, requests = own
    os.remove(requests / "_MANIFEST.json")
    with pytest.raises(UserError, match="tables/requests: "):
        verify.run(settings)


def test_a_violation_is_exit_code_1_and_a_mistake_2(own: tuple[Settings, Path, Path], tmp_path: Path) -> None:
    settings, _, requests = own
    repeat_a_request(requests)
    (tmp_path / "settings.yaml").write_text(json.dumps(settings.model_dump(mode="json", exclude={"ray"})))
    command = ["-m", "jobs.verify", "--config", str(tmp_path / "settings.yaml"), "--ray.num_cpus", "2"]
    done = run_python(*command)
    assert done.returncode == 1, done.stderr
    assert "duplicate_request, 1: a request id occurs twice" in done.stderr
    assert "Traceback" not in done.stderr
    shutil.rmtree(requests.parents[1] / "sequences")
    done = run_python(*command)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("run `python -m jobs.build_sequences`, or name another folder")
