"""What is warmed is what will be asked: of users' best items, the running top-k; of vectors, the last layer's own tokens."""

from pathlib import Path

import pytest

from longer.batch_settings import ExportSettings
from longer.config import Settings
from longer.serving import batch_warm
from longer.serving.batch import spooled_buckets
from longer.serving.batch_answers import Answers
from longer.serving.batch_output import Run
from longer.serving.batch_plan import plan_scores, plan_vectors
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
