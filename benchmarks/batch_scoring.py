"""Offline scoring from Parquet to Parquet, against the same model from scratch and in memory: python -m benchmarks.batch_scoring

One run on one machine and one scorer (a CPU core, or with `--device cuda` a GPU), on a generated log in which all users are
alike, with a model of random weights:

    the job           `jobs.batch_score` of the test split: each history encoded once and appended to, candidates in blocks
    from scratch      the same model in Ray Data's `map_batches`: every request encodes its own history; on a part of the requests
    bare model loop   the model alone over tensors that are in memory, requests packed onto shared histories as in training; and
                      the job's own scoring function over chunks in memory. The faster of the two is the limit.
    best items        users x the whole catalogue with top_k, and the memory that took against the size of the score matrix
    linear in users   a quarter, a half and all of the users x 1,000 candidates

Rates leave out the start of Ray and of the actors, which is given beside them. Prints Markdown; last, one JSON line: the job's
scores per second, and its ratios to `from scratch` and to the bare loop.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from benchmarks.point_reads import commit
from benchmarks.quickstart import cpu_model
from jobs import build_requests, build_sequences, generate_events
from longer.arrays import Float32, RequestBatch
from longer.batch_settings import BatchSettings
from longer.config import Settings, load_settings
from longer.data.batches import concat_histories, rows_of_requests
from longer.data.columns import requests_of
from longer.data.scores import score_rows
from longer.data.tables import RequestTable, SequenceTable
from longer.model.inputs import BatchTensors, to_tensors
from longer.model.longer import Longer
from longer.model.outputs import to_scores
from longer.runner import start_ray
from longer.serving.batch import batch_score
from longer.serving.batch_input import Chunk, Reader
from longer.serving.batch_output import Run
from longer.serving.batch_plan import plan_scores
from longer.serving.offline import Budget, score_lists
from longer.storage import Table, Version, fingerprint, remove_tree
from longer.training.checkpoints import load_model, save_model
from longer.training.loader import SplitData, concat_requests, score_packs

JOB, SCRATCH = "**the job**", "each request from scratch (`map_batches`)"
NUM_DAYS = 60
TEST_SHARE = 0.1
PACK_REQUESTS = 64
NUM_CANDIDATES = 1_000
EVENTS_PER_BUCKET = 1 << 20
"""As `jobs.build_sequences` chooses for large tables."""


def main() -> None:
    asked = _options()
    torch.set_num_threads(1)
    settings = _settings(asked)
    start_ray(settings.ray)
    _make_world(settings, asked.seed)
    rates = defaultdict[str, list[float]](list)
    loops = _bare_loops(settings, asked.device)
    for _ in range(asked.runs):  # all in turn, so that a change in the machine's mood meets all of them
        scored = _fresh(settings, settings.batch_score)
        rates[JOB].append(scored.manifest["num_rows"] / (scored.manifest["seconds"] - scored.manifest["start_s"]))
        rates[SCRATCH].append(_from_scratch(settings, asked.scratch_requests))
        for name, loop in loops.items():
            rates[name].append(scored.manifest["num_rows"] / _seconds(loop, asked.device))
    best = _fresh(
        settings,
        BatchSettings(**_pool(asked), catalogue=True, top_k=100, users=_users_file(settings, asked.top_k_users)),
    )
    linear = {n: _candidates_run(settings, asked, n) for n in (asked.users // 4, asked.users // 2, asked.users)}
    medians = {name: median(of_runs) for name, of_runs in rates.items()}
    vs_scratch, vs_bare = medians[JOB] / medians[SCRATCH], medians[JOB] / max(medians[name] for name in loops)
    print("\n".join(_page(asked, settings, scored, rates, vs_scratch, vs_bare, best, linear)))
    print(json.dumps({"scores_per_s": medians[JOB], "vs_from_scratch": vs_scratch, "vs_bare_loop": vs_bare}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (default cpu)")
    parser.add_argument("--history-events", type=int, default=1_000, help="L (default 1,000)")
    parser.add_argument("--merge-size", type=int, default=4, help="K (default 4)")
    parser.add_argument("--query-groups", type=int, default=50, help="k, twice the stride in groups (default 50)")
    parser.add_argument("--event-width", type=int, default=16, help="d; tokens are K*d wide (default 16)")
    parser.add_argument("--self-layers", type=int, default=2, help="N (default 2)")
    parser.add_argument("--users", type=int, default=200, help="users of the log (default 200)")
    parser.add_argument("--requests-per-user", type=int, default=40, help="about how many (default 40)")
    parser.add_argument("--negatives", type=int, default=9, help="candidates of a request besides its item (default 9)")
    parser.add_argument("--items", type=int, default=10_000, help="items of the log (default 10,000)")
    parser.add_argument("--top-k-users", type=int, default=50, help="users who get the best items of all (default 50)")
    parser.add_argument(
        "--scratch-requests", type=int, default=1_000, help="requests scored from scratch (default 1,000)"
    )
    parser.add_argument("--batch-bytes", type=int, default=256 << 20, help="batch_score.batch_bytes (default 256 MiB)")
    parser.add_argument("--data", default="runs/benchmark_batch_scoring", help="folder for tables, which stay")
    parser.add_argument("--runs", type=int, default=3, help="rounds over the arms; rates are medians (default 3)")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def _pool(asked: argparse.Namespace) -> dict[str, Any]:
    num_gpus = int(asked.device == "cuda")
    return {"concurrency": (1, 1), "num_gpus_per_scorer": num_gpus, "batch_bytes": asked.batch_bytes}


def _settings(asked: argparse.Namespace) -> Settings:
    events_per_user = asked.history_events + round(asked.requests_per_user / TEST_SHARE)
    num_buckets = max(2, asked.users * events_per_user // EVENTS_PER_BUCKET)
    sizes = {name: getattr(asked, name) for name in ("history_events", "merge_size", "query_groups", "event_width")}
    model = {**sizes, "stride_groups": asked.query_groups // 2, "num_self_layers": asked.self_layers}
    return load_settings(
        overrides={
            "root": f"{asked.data}/{fingerprint(sorted((k, v) for k, v in vars(asked).items() if k != 'runs'))}",
            "seed": asked.seed,
            "event_schema": {"features": [{"name": "category", "kind": "categorical", "of": "item"}]},
            "generate": {
                "num_users": asked.users,
                "num_events": asked.users * events_per_user,
                "num_items": asked.items,
                "num_days": NUM_DAYS,
                "user_zipf_exponent": 0,
            },
            "sequences": {"keep_events": 2 * events_per_user, "num_buckets": num_buckets},
            "requests": {"negatives_per_positive": asked.negatives, "test_days_share": TEST_SHARE},
            "model": model,
            "batch_score": _pool(asked),
            "ray": {"num_cpus": 4},
        }
    )


def _make_world(settings: Settings, seed: int) -> None:
    """Tables by the platform's own jobs, and a model of random weights."""
    generate_events.run(settings)
    build_sequences.run(settings)
    build_requests.run(settings)
    torch.manual_seed(seed)
    model = Longer(settings.model, settings.event_schema, settings.train.tasks)
    table, version_id = Table(settings.path("checkpoints")), fingerprint("random", seed)
    if table.reuse(version_id) is None:
        path = table.begin(version_id)
        model_version = save_model(path, model, settings.model, settings.event_schema, settings.train.tasks)
        about = {"schema_hash": settings.event_schema.hash(), "model_version": model_version}
        table.publish(version_id, about)


def _fresh(settings: Settings, chosen: BatchSettings) -> Version:
    """A run of the job, though an earlier one may have done the same."""
    asked = settings.model_copy(update={"batch_score": chosen})
    remove_tree(plan_scores(asked).table_path)
    return batch_score(asked)


def _users_file(settings: Settings, num_users: int) -> str:
    path = settings.path(f"users-{num_users}.parquet")
    pq.write_table(pa.table({"user_id": np.arange(1, num_users + 1)}), path)
    return path


def _candidates_run(settings: Settings, asked: argparse.Namespace, num_users: int) -> Version:
    candidates = settings.path("candidates.parquet")
    pq.write_table(pa.table({"item_id": np.arange(1, NUM_CANDIDATES + 1)}), candidates)
    users = _users_file(settings, num_users)
    return _fresh(settings, BatchSettings(**_pool(asked), users=users, candidates=candidates))


class FromScratch:
    """Scores each request on a history of its own, as a job without states would; one instance an actor."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(1)
        self._plan = plan_scores(settings)
        self._model, _ = load_model(self._plan.checkpoint.path, self._plan.device)
        self._sequences = SequenceTable(settings.path("tables", "sequences"), self._plan.schema)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The score rows, with the times between which they were made."""
        begun, schema = time.time(), self._plan.schema
        requests = requests_of(rows.select(schema.requests_arrow().names), schema)
        histories = self._sequences.get(requests.user_id_R.unique())
        data = SplitData(histories, requests, rows_of_requests(histories, requests), self._model.windows)
        output_CT = np.empty((len(requests.item_id_C), len(self._model.tasks)), np.float32)
        for rows_N, outputs_NT in score_packs(data, data.packs(1), self._forward):
            output_CT[rows_N] = outputs_NT
        scored = score_rows(requests, to_scores(output_CT, self._model.tasks), schema)
        times = {name: pa.array(np.full(len(rows), x)) for name, x in (("begun", begun), ("done", time.time()))}
        return pa.table({**{name: scored[name] for name in scored.column_names}, **times})

    @torch.inference_mode()
    def _forward(self, batch: RequestBatch) -> Float32:
        return self._model(to_tensors(batch, self._plan.device)).float().cpu().numpy()


def _from_scratch(settings: Settings, num_requests: int) -> float:
    """Scores per second of whole users' first requests, from the first batch begun to the last one written."""
    output = settings.path("from_scratch")
    remove_tree(output)
    requests = Table(settings.path("tables", "requests")).require("jobs.build_requests")
    rows = ray.data.read_parquet(requests.files("split=test/"), partitioning=None).limit(num_requests)
    pool = settings.batch_score
    rows.map_batches(
        FromScratch,
        fn_constructor_args=(settings,),
        batch_size=256,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        num_gpus=pool.num_gpus_per_scorer or None,
    ).write_parquet(output)
    written = pq.read_table(output, partitioning=None)
    seconds = pa.compute.max(written["done"]).as_py() - pa.compute.min(written["begun"]).as_py()
    return len(written["item_id"].combine_chunks().flatten()) / seconds


def _bare_loops(settings: Settings, device: str) -> dict[str, Callable[[], None]]:
    """Scores all test requests over what is in memory: as in training, and as in the job. Both have run once."""
    plan = plan_scores(settings)
    model, _ = load_model(plan.checkpoint.path, device)
    requests = RequestTable(settings.path("tables", "requests"), plan.schema)
    sequences = SequenceTable(settings.path("tables", "sequences"), plan.schema, plan.sequences.id)
    reader = Reader(plan, sequences, requests, Run(""), model.windows, 1)
    chunks = [chunk for bucket in sequences.buckets for chunk in reader.chunks(bucket)]
    batches = list(_packed(model, chunks, device))
    budget = Budget(model, settings.batch_score.batch_bytes)

    @torch.inference_mode()
    def packed() -> None:
        for batch in batches:
            model(batch)

    def appended() -> None:
        for chunk in chunks:
            assert chunk.requests
            score_lists(chunk.questions, chunk.requests.candidates, budget)

    loops = {"requests packed as in training": packed, "the job's scoring of chunks": appended}
    for loop in loops.values():
        loop()
    return {f"bare loop: {name}": loop for name, loop in loops.items()}


def _packed(model: Longer, chunks: list[Chunk], device: str) -> Iterator[BatchTensors]:
    """All requests as batches of the training forward pass, on the device."""
    asked = concat_requests([chunk.requests for chunk in chunks if chunk.requests])
    histories = concat_histories([chunk.questions.histories for chunk in chunks])
    data = SplitData(histories, asked, rows_of_requests(histories, asked), model.windows)
    batches: list[RequestBatch] = []

    def gather(batch: RequestBatch) -> Float32:
        batches.append(batch)
        return np.zeros((len(batch.candidates.features["item_id"]), len(model.tasks)), np.float32)

    for _ in score_packs(data, data.packs(PACK_REQUESTS), gather):
        pass
    return (to_tensors(batch, device) for batch in batches)


def _seconds(work: Callable[[], None], device: str) -> float:
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _page(
    asked: argparse.Namespace,
    settings: Settings,
    scored: Version,
    rates: dict[str, list[float]],
    vs_scratch: float,
    vs_bare: float,
    best: Version,
    linear: dict[int, Version],
) -> list[str]:
    told, sizes, job = scored.manifest, settings.model, median(rates[JOB])
    device = torch.cuda.get_device_name() if asked.device == "cuda" else f"one core of {cpu_model()}"
    lines = [
        "# Offline scoring, from Parquet to Parquet\n",
        f"`python -m benchmarks.batch_scoring {' '.join(sys.argv[1:])}`\n",
        f"- hardware: {device}; one scorer",
        f"- commit {commit()}; torch {torch.__version__}, ray {ray.__version__}, pyarrow {pa.__version__}",
        f"- L = {sizes.history_events}, K = {sizes.merge_size}, D = {sizes.width}, k = {sizes.query_groups}, "
        f"{sizes.num_self_layers} self layers; {told['num_users']} users, {told['num_requests']} requests, "
        f"{told['num_rows']} scores; medians of {asked.runs} runs\n",
        "| | scores/s | of the job |",
        "|---|---|---|",
        *(
            f"| {name} | {median(runs):,.0f} ({min(runs):,.0f} to {max(runs):,.0f}) | {median(runs) / job:.3f} |"
            for name, runs in rates.items()
        ),
        "",
        f"The job is {vs_scratch:.1f} times as fast as from scratch and reaches {vs_bare:.0%} of the faster bare loop. Before "
        f"that, {told['start_s']:.1f} s until its actor is up; {told['device_s_per_million_scores']:.2f} device-seconds a million "
        f"scores. {told['online_check']['requests']} requests through the serving path too: largest difference "
        f"{told['online_check']['max_abs_diff']:.1e}.\n",
        _best_in_words(best, asked.items),
        "",
        "| users | seconds | ms a user |",
        "|---|---|---|",
    ]
    for num_users, version in linear.items():
        seconds = version.manifest["device_s"]
        lines.append(f"| {num_users} x {NUM_CANDIDATES} candidates | {seconds:.2f} | {seconds / num_users * 1e3:.2f} |")
    return [*lines, ""]


def _best_in_words(best: Version, num_items: int) -> str:
    told, matrix_bytes = best.manifest, 4 * best.manifest["num_rows"]
    rate = told["num_rows"] / (told["seconds"] - told["start_s"])
    where = "of the GPU" if told["device"] == "cuda" else "in the process"
    return (
        f"Best 100 of {num_items:,} items for {told['num_users']:,} users: {told['num_rows']:,} scores, {rate:,.0f} a second, "
        f"at most {told['peak_bytes'] / 1e6:,.0f} MB {where}; the scores alone would be {matrix_bytes / 1e6:,.0f} MB. "
        f"Largest difference from the serving path {told['online_check']['max_abs_diff']:.1e}."
    )


if __name__ == "__main__":
    main()
