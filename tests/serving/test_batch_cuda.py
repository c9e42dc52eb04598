"""On a GPU an offline run answers as on a CPU, and as the serving path's captured graphs do, in float32 and in bf16."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from longer.batch_settings import ExportSettings
from longer.config import Settings
from longer.data.columns import flat_list
from longer.data.scores import most_difference, relative_gaps
from longer.serving.batch_output import Run
from longer.serving.batch_plan import Plan, plan_scores, plan_vectors
from longer.serving.batch_scorer import BucketScorer
from tests.serving.batch_runs import asking, ids_file, world_with_requests, written_here

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return world_with_requests(tmp_path_factory.mktemp("cuda"))


def plans(world: Settings, folder: Path) -> dict[str, Plan]:
    candidates = ids_file(folder, item_id=[f"item{i}" for i in range(1, 30)])
    vectors = world.model_copy(update={"export_embeddings": ExportSettings()})
    return {
        "requests": plan_scores(world),
        "lists": plan_scores(asking(world, candidates=candidates)),
        "vectors": plan_vectors(vectors),
    }


def answers_of(rows: pa.Table) -> np.ndarray:
    return np.concatenate(
        [
            flat_list(rows[name])[1].to_numpy()
            for name in rows.column_names
            if name.startswith("score_") or name == "vector"
        ]
    )


@pytest.mark.parametrize("kind", ["requests", "lists", "vectors"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_answers_are_those_of_the_cpu(world: Settings, tmp_path: Path, kind: str, precision: str) -> None:
    if kind == "vectors" and precision == "bf16":
        pytest.skip("vectors are made in float32")
    plan = plans(world, tmp_path)[kind]
    expected = answers_of(written_here(plan, tmp_path / "cpu"))
    on_gpu = replace(plan, device="cuda", precision=precision, check_requests=100)
    found = answers_of(
        written_here(on_gpu, tmp_path / "gpu")
    )  # the serving path, on the GPU too, is compared on the way
    gaps = relative_gaps(expected, found, "regression" if kind == "vectors" else "binary")
    assert gaps.max() <= most_difference(precision)


def test_the_best_items_of_a_gpu_are_compared_with_its_serving_path(world: Settings, tmp_path: Path) -> None:
    plan = plan_scores(asking(world, catalogue=True, top_k=3))
    for precision in ("float32", "bf16"):
        run = Run(str(tmp_path / precision))
        record = BucketScorer(replace(plan, device="cuda", precision=precision), run).write_bucket(0)
        assert record["num_compared"] > 0
        assert record["peak_gpu_bytes"] > 0
