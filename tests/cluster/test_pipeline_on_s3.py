"""The whole platform by `ray job submit` on three nodes that know nothing of this package, with every path on S3.

One cluster and one run of the pipeline serve every test.
"""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from longer.files import exists, filesystem, read_bytes, write_bytes
from longer.storage import Table, Version
from tests.cluster.nodes import BIN, SEEN_DEAD_SOON, Head, kill_node, processes_of, running_head
from tests.cluster.nodes import ROOT as PROJECT
from tests.s3.server import running_bucket
from tests.test_pipeline import SIZES, write_purchases

pytestmark = [pytest.mark.ray, pytest.mark.slow]
LOG, RUN, LOST = "s3://tables/log", "s3://tables/run", "s3://tables/lost"
CHOSEN = {**SIZES, "train.epochs": 20, "import_events.source": LOG, "ray.pool_label": "longer.pool"}
_COMMITTED_SOON = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
_WITHIN_S = 180


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head without CPUs, and two nodes of one CPU each."""
    with (
        pytest.MonkeyPatch.context() as patch,
        running_bucket(patch),
        running_head(
            *("--num-cpus=0", "--labels", "longer.pool=head"), environment={**SEEN_DEAD_SOON, **_COMMITTED_SOON}
        ) as started,
    ):
        for _ in range(2):
            add_node(started)
        yield started


def add_node(head: Head) -> None:
    head.add_node("--num-cpus=1", "--labels", "longer.pool=cpu")


def submit(head: Head, job: str, root: str, log: Path) -> subprocess.Popen:
    """The job as docs/cluster.md submits it; what it prints goes to a file."""
    flags = [word for name, value in CHOSEN.items() for word in (f"--{name}", str(value))]
    entrypoint = ["python", "-m", job, "--config", "configs/quickstart.yaml", "--root", root, *flags]
    modules = json.dumps({"py_modules": ["platform/longer"]})
    where = ["--address", head.url, "--working-dir", ".", "--runtime-env-json", modules]
    with log.open("w") as out:
        return subprocess.Popen(
            [str(BIN / "ray"), "job", "submit", *where, "--", *entrypoint],
            cwd=PROJECT,
            env=head.environment,
            stdout=out,
            stderr=out,
        )


def finish(job: subprocess.Popen, log: Path) -> str:
    """What the job printed, once it has ended well."""
    code = job.wait(_WITHIN_S)
    assert code == 0, log.read_text()[-4000:]
    return log.read_text()


@pytest.fixture(scope="module")
def pipeline(head: Head, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run of every stage printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "log").mkdir()
    write_purchases(folder / "log")
    for file in (folder / "log").iterdir():
        write_bytes(f"{LOG}/{file.name}", file.read_bytes())
    return finish(submit(head, "jobs.pipeline", RUN, folder / "said"), folder / "said")


def published(root: str, path: str) -> Version:
    version = Table(f"{root}/{path}").current()
    assert version is not None
    return version


def losses_of(version: Version) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in version.manifest["history"] if "loss" in record]


def test_every_stage_runs_and_offline_online_and_batch_scores_agree(pipeline: str) -> None:
    report = json.loads(read_bytes(f"{RUN}/report.json"))
    assert report["serving"]["max_abs_diff_vs_offline"] <= 1e-5
    assert report["serving"]["cache"]["append"] > 0
    assert report["batch"]["max_abs_diff_vs_online"] <= 1e-5
    assert report["test"]["auc"] > 0.5
    assert exists(f"{RUN}/report.html")


def test_training_that_loses_a_node_learns_what_it_would_have_learned(
    pipeline: str, head: Head, tmp_path: Path
) -> None:
    """A worker's node dies after a checkpoint, another comes: every step's loss equals that of the undisturbed run."""
    copy_tables()
    undisturbed, log = published(RUN, "checkpoints"), tmp_path / "said"
    job = submit(head, "jobs.train", LOST, log)
    committed = f"{LOST}/training/{undisturbed.id}/checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + _WITHIN_S
    while not (exists(committed) and json.loads(read_bytes(committed))["checkpoint_results"]):
        assert job.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, "no checkpoint was committed"
        time.sleep(0.05)
    lost = head.nodes[-1]
    assert any("RayTrainWorker" in command for command in processes_of(lost).values()), "no worker trains there"
    kill_node(lost)
    add_node(head)
    said = finish(job, log)
    first, second = (int(step) for step in re.findall(r"starting at step (\d+)", said))
    steps, losses = zip(*losses_of(published(LOST, "checkpoints")), strict=True)
    expected_steps, expected_losses = zip(*losses_of(undisturbed), strict=True)
    assert first == 0
    assert 0 < second < expected_steps[-1], "it was not interrupted in its midst"
    assert steps == expected_steps == tuple(range(1, len(steps) + 1))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)


def copy_tables() -> None:
    """The tables that training reads, under a root of its own."""
    store, tables = filesystem(f"{RUN}/tables")
    for file in store.find(tables):
        write_bytes(f"{LOST}/tables{file.removeprefix(tables)}", read_bytes(f"s3://{file}"))
