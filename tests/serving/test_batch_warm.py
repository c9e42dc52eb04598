"""What is warmed is what will be asked: of users' best items, the running top-k; of vectors, the last layer's own tokens.

One actor of a machine does it first.
"""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from longer.batch_settings import ExportSettings
from longer.config import Settings
from longer.serving import batch_turns, batch_warm
from longer.serving.batch import spooled_buckets
from longer.serving.batch_answers import Answers
from longer.serving.batch_output import Run
from longer.serving.batch_plan import plan_scores, plan_vectors
from longer.serving.batch_turns import first_alone
from longer.serving.batch_warm import rehearse
from longer.serving.questions import Budget
from longer.serving.stages import collected_ms
from longer.training.checkpoints import load_model
from tests.serving.batch_runs import asking, ids_file, world_with_requests
from tests.serving.tables import checkpoint_path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return world_with_requests(tmp_path_factory.mktemp("warm"))


@pytest.mark.parametrize(
    ("kind", "called"),
    [("requests", "_score_lists"), ("lists", "_lists"), ("top_k", "_best"), ("vectors", "_vectors")],
)
def test_the_mode_that_is_asked_is_warmed(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, called: str
) -> None:
    plan = {
        "requests": lambda: plan_scores(world),
        "lists": lambda: plan_scores(asking(world, candidates=ids_file(tmp_path, item_id=["item1", "item2"]))),
        "top_k": lambda: plan_scores(asking(world, catalogue=True, top_k=3)),
        "vectors": lambda: plan_vectors(world.model_copy(update={"export_embeddings": ExportSettings()})),
    }[kind]()
    run = Run(str(tmp_path / "run"))
    spooled_buckets(plan, run)
    model, _ = load_model(checkpoint_path(world))
    answers = Answers.of(plan, Budget(model, plan.batch_bytes), run)
    monkeypatch.setattr(batch_warm, "_MOST_ITEMS", 7)
    calls = []
    for place, names in ((batch_warm, ["_score_lists"]), (Answers, ["_lists", "_best", "_vectors"])):
        for name in names:
            monkeypatch.setattr(place, name, _noting(getattr(place, name), name, calls))
    with collected_ms() as stages:
        rehearse(answers)
    assert set(calls) == {called}
    assert stages["encode"] > 0


def _noting(call: object, name: str, calls: list[str]) -> object:
    def noted(*args: object) -> object:
        calls.append(name)
        return call(*args)  # type: ignore[operator]

    return noted


ENTER = "import sys; from longer.serving.batch_turns import first_alone\nwith first_alone(*sys.argv[1:]): print(1, flush=True); {}"


def entering(name: str, then: str, run: str = "a run") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ENTER.format(then), name, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("end", ["is killed", "fails"])
def test_who_waits_for_one_that_dies_or_fails_is_the_next_first(end: str) -> None:
    name = f"test-{uuid.uuid4().hex}"
    first = entering(
        name, "import time; time.sleep(60)" if end == "is killed" else "import time; time.sleep(0.5); 1 / 0"
    )
    assert first.stdout
    assert first.stdout.readline()
    second = entering(name, "pass")
    assert second.stdout
    if end == "is killed":
        time.sleep(0.3)
        assert second.poll() is None
        os.kill(first.pid, signal.SIGKILL)
    assert second.stdout.readline()
    assert (first.wait(20) != 0, second.wait(20)) == (True, 0)


def test_once_the_first_is_through_the_others_go_in_side_by_side() -> None:
    name = f"test-{uuid.uuid4().hex}"
    assert entering(name, "pass").wait(20) == 0
    others = [entering(name, "sys.stdin.read()") for _ in range(2)]
    for other in others:
        assert other.stdout
        assert other.stdout.readline()
        other.kill()


def test_the_first_of_the_next_run_is_alone_again_and_no_run_leaves_a_file_of_its_own(tmp_path: Path) -> None:
    """Another model has other kernels; a machine that scores every night would fill with files."""
    environment, noted = {**os.environ, "TMPDIR": str(tmp_path)}, tmp_path / "noted"
    enter = ENTER.format(f"open({str(noted)!r}, 'a').write(sys.argv[2][-1]); time.sleep(0.3)").replace(
        "sys;", "sys, time;"
    )
    for run in ("run 1", "run 2"):
        both = [subprocess.Popen([sys.executable, "-c", enter, "name", run], env=environment) for _ in range(2)]
        assert [one.wait(20) for one in both] == [0, 0]
    assert noted.read_text() == "1122"
    assert [file.read_text() for file in tmp_path.glob("longer-*.lock")] == ["run 2"]


def test_who_waits_too_long_says_so_and_goes_on_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And does not say that it was the first: whoever comes next still waits for that one."""
    name = f"test-{uuid.uuid4().hex}"
    first = entering(name, "sys.stdin.read()")
    assert first.stdout
    assert first.stdout.readline()
    monkeypatch.setattr(batch_turns, "_TOLD_EVERY_S", 0.5)
    monkeypatch.setattr(batch_turns, "_MOST_WAIT_S", 1.0)
    for _ in range(2):
        with first_alone(name, "a run"):
            assert re.search(r"this one waits\n.*goes on by itself", capsys.readouterr().err)
    first.kill()
