"""Whole jobs, s3:// in and out: what fails on the way leaves no trace in what they build, and never half a version."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from longer.config import Settings
from longer.data.parquet import read_columns
from longer.files import write_bytes
from longer.storage import Table, Version
from tests.data.logs import generated_log
from tests.data.test_build_on_ray import run_all, settings_of
from tests.s3.proxy import Fault, Plan, Proxy, Request, no_faults

pytestmark = pytest.mark.ray
ALL_JOBS = "import_events,build_sequences,build_requests,verify"
TABLES = ("events", "sequences", "requests")
EVENTS = generated_log(num_users=40, num_days=12, seed=4)


def on_s3(settings: Settings, folder: Path, **sections: dict) -> str:
    """A settings file for the same log and tables under s3://tables, with the log uploaded."""
    for file in Path(settings.import_events.source).iterdir():
        write_bytes(f"s3://tables/source/{file.name}", file.read_bytes())
    chosen = settings.model_dump(mode="json", exclude={"ray"})
    chosen["import_events"]["source"] = "s3://tables/source"
    for section, values in sections.items():
        chosen[section].update(values)
    path = folder / "s3.json"
    path.write_text(
        json.dumps({**chosen, "root": "s3://tables/run", "ray": {"num_cpus": 4, "object_store_bytes": 100 << 20}})
    )
    return str(path)


def start(jobs: str, config: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.s3.run_jobs", jobs, "--config", config]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    """What it printed, once it has ended well."""
    printed = process.communicate(timeout=200)[1]
    assert process.returncode == 0, printed
    return printed


def upload_tables(local: Settings, *tables: str) -> None:
    """Puts tables of the local disk under the root on S3, as an earlier run would have."""
    for table in tables:
        for file in Path(local.root, "tables", table).rglob("*"):
            if file.is_file():
                write_bytes(f"s3://tables/run/{file.relative_to(local.root)}", file.read_bytes())


def rows_of(version: Version) -> pa.Table:
    return pa.concat_tables([read_columns(file) for file in version.files()])


def served(root: str, table: str) -> Version:
    version = Table(f"{root}/tables/{table}").current()
    assert version is not None
    return version


@pytest.fixture(scope="module")
def local(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of tables that are already built on the local disk, from the same log."""
    settings = settings_of(tmp_path_factory.mktemp("local"), EVENTS)
    run_all(settings)
    return settings


def check_equal_to_local(local: Settings) -> None:
    for table in TABLES:
        there, here = served("s3://tables/run", table), served(local.root, table)
        assert [file.path for file in there.data_files()] == [file.path for file in here.data_files()]
        assert rows_of(there).equals(rows_of(here)), f"{table} differ from those built without faults on a local disk"


def some_fail(seed: int) -> Plan:
    """Of the requests a tenth get a 500 or 503, and some reads are cut short or slow."""
    rng = random.Random(seed)

    def plan(request: Request) -> Fault | None:
        faults = [Fault(status=500), Fault(status=503)]
        if request.method == "GET":
            faults += [Fault(cut=True), Fault(delay_s=0.3), Fault(stall_s=0.3)]
        return rng.choice(faults) if rng.random() < 0.05 * len(faults) else None

    return plan


def test_jobs_with_500s_cut_bodies_and_slow_reads_build_what_a_local_disk_holds(
    faulty_s3: Proxy, local: Settings, tmp_path: Path
) -> None:
    config = on_s3(local, tmp_path)
    faulty_s3.plan = some_fail(seed=1)
    printed = finish(start(ALL_JOBS, config))
    assert printed.strip().endswith("no violation")
    assert faulty_s3.num_faults > 20
    faulty_s3.plan = no_faults
    check_equal_to_local(local)


def test_a_worker_killed_in_mid_job_is_replaced_and_nothing_is_lost(
    faulty_s3: Proxy, local: Settings, tmp_path: Path
) -> None:
    """The first worker that writes a data file of each table is killed while its request waits."""
    upload_tables(local, "events")
    config, killed = on_s3(local, tmp_path), {}
    process = start("build_sequences,build_requests,verify", config)

    def plan(request: Request) -> Fault | None:
        table = next((t for t in ("sequences", "requests") if f"/{t}/" in request.path), None)
        writes = request.method in ("PUT", "POST") and "part-0.parquet" in request.path
        if not (writes and table and table not in killed):
            return None
        worker = busy_worker_of(process.pid)
        if worker is None:
            return None
        killed[table] = worker
        os.kill(worker, signal.SIGKILL)
        return Fault(status=500)

    faulty_s3.plan = plan
    assert finish(process).strip().endswith("no violation")
    assert set(killed) == {"sequences", "requests"}
    check_equal_to_local(local)


def test_a_job_killed_between_data_and_manifest_leaves_the_old_version_and_a_rerun_completes(
    faulty_s3: Proxy, local: Settings, tmp_path: Path
) -> None:
    upload_tables(local, *TABLES)
    old = served("s3://tables/run", "sequences")
    changed = on_s3(local, tmp_path, sequences={"row_group_events": 3})
    process = start("build_sequences", changed)
    faulty_s3.plan = kill_before_manifest(process, "sequences")
    process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL
    faulty_s3.plan = no_faults
    still = served("s3://tables/run", "sequences")
    assert (still.id, still.manifest) == (old.id, old.manifest)
    assert rows_of(still).equals(rows_of(served(local.root, "sequences")))
    assert finish(start("build_sequences,build_requests,verify", changed)).strip().endswith("no violation")
    new = served("s3://tables/run", "sequences")
    assert new.id != old.id
    assert rows_of(new).equals(rows_of(old))


def kill_before_manifest(process: subprocess.Popen, table: str) -> Plan:
    """A plan that kills the job when it puts the table's manifest, which does not arrive."""

    def plan(request: Request) -> Fault | None:
        if request.method == "PUT" and f"/{table}/" in request.path and "_MANIFEST.json" in request.path:
            process.kill()
            return Fault(status=500)
        return None

    return plan


def busy_worker_of(driver: int) -> int | None:
    """A worker process of the Ray that the driver started, one that is running a task; None if there is none yet."""
    children: dict[int, list[int]] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_text().split("\0")[0]
        except (OSError, ValueError):  # not a process, or one that has just ended
            continue
        children.setdefault(parent, []).append(int(folder.name))
    family, found = [driver], []
    while family:
        for pid in children.get(family.pop(), []):
            family.append(pid)
            if titles[pid].startswith("ray::") and not re.search(r"IDLE|Agent", titles[pid]):
                found.append(pid)
    return found[0] if found else None
