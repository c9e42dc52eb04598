"""The offline benchmark in small, in both of its modes: every arm runs, and goals are told of what was measured."""

import json
import sys
from pathlib import Path

import pytest
from ray.data import DataContext

from benchmarks import batch_scoring
from benchmarks.batch_arms import arms

pytestmark = pytest.mark.ray

SIZES = "--history-events 40 --merge-size 2 --query-groups 4 --event-width 4 --self-layers 1 --requests-per-user 10 --negatives 3"
SPLIT = "--users 20 --items 1200 --top-k-users 4 --linear-users 8 --candidates 20 --scratch-requests 40 --runs 1"
CATALOGUE = "--catalogue-items 1200 --top-k-users 20"


@pytest.mark.parametrize(("mode", "goal"), [(SPLIT, "times scoring from scratch"), (CATALOGUE, "than for a tenth")])
def test_each_mode_runs_to_its_last_line_and_keeps_what_it_has(
    mode: str,
    goal: str,
    local_ray: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Slow: several runs of the job, each with actors of its own."""
    asked = [*SIZES.split(), *mode.split(), "--top-k", "3"]
    asked += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "page")]
    monkeypatch.setattr(sys, "argv", ["batch_scoring", *asked])
    monkeypatch.setattr(arms, "_LOOP_S", 0.1)
    context = DataContext.get_current()
    monkeypatch.setattr(context, "wait_for_min_actors_s", context.wait_for_min_actors_s)  # which the benchmark sets
    batch_scoring.main()
    page = (tmp_path / "page").read_text().splitlines()
    assert json.loads(page[-1])["scores_per_s"] > 0
    assert any(goal in line for line in page)
    assert set(page) <= set(capsys.readouterr().out.splitlines()), "Ray's warnings may stand among them"
