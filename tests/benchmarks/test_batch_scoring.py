"""The offline benchmark in small, in both of its modes: every arm runs, and goals are told of what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

SIZES = "--history-events 40 --merge-size 2 --query-groups 4 --event-width 4 --self-layers 1 --requests-per-user 10 --negatives 3"
SPLIT = "--users 20 --items 1200 --top-k-users 4 --linear-users 8 --candidates 20 --scratch-requests 40 --runs 1"
CATALOGUE = "--catalogue-items 1200 --top-k-users 20"


@pytest.mark.parametrize(("mode", "goal"), [(SPLIT, "times scoring from scratch"), (CATALOGUE, "than for a tenth")])
def test_each_mode_runs_to_its_last_line_and_keeps_what_it_has(mode: str, goal: str, tmp_path: Path) -> None:
    """A Ray of its own and several runs of the job: half a minute."""
    command = [sys.executable, "-m", "benchmarks.batch_scoring", *SIZES.split(), *mode.split(), "--top-k", "3"]
    command += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "page")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "page").read_text().splitlines()
    assert json.loads(page[-1])["scores_per_s"] > 0
    assert any(goal in line for line in page)
    assert set(page) <= set(done.stdout.splitlines()), "Ray's warnings may stand among them"
