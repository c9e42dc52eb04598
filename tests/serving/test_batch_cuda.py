"""On a GPU an offline run answers as on a CPU, and as the serving path does kernel by kernel, in float32 and in bf16.

That a replica, whose kernels are compiled and captured, answers so too is tested by test_replica.py.
"""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from longer.batch_settings import ExportSettings
from longer.config import Settings
from longer.data.columns import flat_list
from longer.data.records import Record
from longer.data.scores import most_difference, relative_gaps
from longer.serving import batch_warm, offline
from longer.serving.batch_answers import computing_in
from longer.serving.batch_output import Run
from longer.serving.batch_plan import Plan, plan_scores, plan_vectors
from longer.serving.batch_scorer import BucketScorer
from longer.serving.batch_warm import rehearse
from longer.serving.offline import score_lists
from longer.serving.questions import Budget
from tests.model.generate import random_candidates, small_model
from tests.serving.batch_runs import asking, ids_file, world_with_requests, written_here
from tests.serving.test_offline import random_questions

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


@pytest.fixture(autouse=True)
def in_this_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are packed, but where a test says that they are swept."""
    monkeypatch.setattr(offline, "packs_pay", lambda _: "swept" not in request.node.name)


@pytest.mark.parametrize("kind", ["requests", "requests, swept", "lists", "vectors"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_answers_are_those_of_the_cpu(world: Settings, tmp_path: Path, kind: str, precision: str) -> None:
    if kind == "vectors" and precision == "bf16":
        pytest.skip("vectors are made in float32")
    plan = plans(world, tmp_path)[kind.removesuffix(", swept")]
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
        [record] = BucketScorer(replace(plan, device="cuda", precision=precision), run).write_bucket(0)
        assert record["num_compared"] > 0
        assert record["peak_gpu_bytes"] > 0


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_what_the_rehearsal_has_compiled_serves_packs_of_any_sizes(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Also one request of one user about one candidate; compiling anew is an error here."""
    plan = replace(plans(world, tmp_path)["requests"], device="cuda", precision=precision)
    answers = BucketScorer(plan, Run(str(tmp_path / "run")))._answers
    model = answers.budget.model
    rehearse(answers)
    for num_users, num_requests, num_windows, num_candidates in (
        (1, 1, 1, 1),
        (1, 2, 3, 16),
        (50, 3, 2, 9),
        (2, 90, 1, 77),
    ):
        monkeypatch.setattr(batch_warm, "_NUM_CANDIDATES", num_candidates)
        questions = batch_warm._questions(model, num_users, num_requests, num_windows)
        candidates = batch_warm._candidates(model.schema, len(questions))
        with torch.compiler.set_stance("fail_on_recompile"), computing_in(precision, "cuda"):
            assert np.isfinite(score_lists(questions, candidates, answers.budget)).all()


def test_lists_of_one_user_with_many_requests_or_candidates_stay_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """100,000 candidates of a request do not fit, nor do 4,000 requests: they are asked in parts."""
    monkeypatch.undo()  # as it is decided where nobody interferes
    model = small_model(0, torch.float32, event_width=32).cuda()
    budget, rng = Budget(model, 64 << 20), np.random.default_rng(0)
    for lengths in ([100_000], [50] * 4_000):
        questions = random_questions(rng, [900], len(lengths))
        candidates = random_candidates(rng, lengths)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.compiler.set_stance("force_eager"):
            scored = score_lists(questions, candidates, budget)
        assert np.isfinite(scored).all()
        assert torch.cuda.max_memory_allocated() - before < 2 * budget.num_bytes  # eager code keeps more than compiled


@pytest.mark.parametrize("kind", ["top items", "requests"])
def test_two_buckets_at_once_stay_within_the_memory_that_an_actor_was_given(
    world: Settings, tmp_path: Path, kind: str
) -> None:
    """One is compared with the serving path, in eager code, or laid out, while the other is scored."""
    plan = plan_scores(asking(world, catalogue=True, top_k=3) if kind == "top items" else world)
    plan = replace(plan, device="cuda", check_requests=100, batch_bytes=32 << 20)
    scorer = BucketScorer(plan, Run(str(tmp_path)))
    with ThreadPoolExecutor(2) as both:
        list(both.map(scorer.write_bucket, [0, 1]))  # compiles, and each thread gets cuBLAS's workspace, once
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        list(both.map(scorer.write_bucket, [0, 1, 0, 1]))
    assert torch.cuda.max_memory_allocated() - before < 1.5 * plan.batch_bytes


ALONE = """import pickle, sys
from longer.serving.batch_output import Run
from longer.serving.batch_scorer import BucketScorer
plan, folder = pickle.loads(bytes.fromhex(sys.argv[1])), sys.argv[2]
print(BucketScorer(plan, Run(folder)).write_bucket(1)[0]["file"]["sha256"])
"""


def test_a_bucket_has_the_same_bytes_alone_beside_another_and_in_a_fresh_process(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a rerun goes on with what a killed run has done. Compiles in two processes: a minute."""
    monkeypatch.undo()  # the fresh process decides by itself how lists are scored
    plan = replace(plan_scores(world), device="cuda", precision="bf16")

    def checksum(record: Record) -> str:
        return record["file"]["sha256"]

    [alone] = map(checksum, BucketScorer(plan, Run(str(tmp_path / "alone"))).write_bucket(1))
    scorer = BucketScorer(plan, Run(str(tmp_path / "beside")))
    with ThreadPoolExecutor(2) as both:
        found = {checksum(record) for records in both.map(scorer.write_bucket, [0, 1, 1]) for record in records}
    assert found - {alone} == set(map(checksum, scorer.write_bucket(0)))
    command = [sys.executable, "-c", ALONE, pickle.dumps(plan).hex(), str(tmp_path / "fresh")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1] == alone
