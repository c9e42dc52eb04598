"""What the job is compared with: each request from scratch in Ray Data, and bare loops over what is in memory."""

import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from benchmarks.batch_arms.page import SCRATCH_LOOP
from longer.arrays import Float32, Int64
from longer.config import Settings
from longer.data.batches import rows_of_requests
from longer.data.columns import requests_of
from longer.data.scores import score_rows
from longer.data.tables import SequenceTable
from longer.files import remove_tree
from longer.model.longer import Longer
from longer.model.outputs import to_scores
from longer.serving.batch import scorer_options
from longer.serving.batch_answers import Answers, computing_in
from longer.serving.batch_input import Chunk, Reader
from longer.serving.batch_output import Run
from longer.serving.batch_plan import plan_scores
from longer.serving.batch_warm import warm_up
from longer.serving.offline import score_lists
from longer.serving.packed import Packed, score_packed
from longer.serving.questions import Budget, Questions, candidates_of
from longer.storage import Table
from longer.training.checkpoints import load_model
from longer.training.loader import COST_PER_BATCH

PACK_REQUESTS = 256
_ALONE_REQUESTS = 512
_MAP_REQUESTS = {"cpu": 256, "cuda": 1024}
_SCRATCH_S = 10
_LOOP_CANDIDATES = 1 << 21
"""About how many candidates the bare loops score: a rate needs no more."""

_LOOP_S = 2

Loop = Callable[[], int]
"""Scores what is in memory; how many scores that are."""


def batch_cost(device: str) -> int:
    """Events and candidates of a batch of the training pass: what fills a GPU, or a CPU's caches."""
    return 1 << 20 if device == "cuda" else COST_PER_BATCH


class FromScratch:
    """Scores each request on a history of its own, as a job without states would; one instance an actor.

    In all else as the job does: kernels compiled before, batches filled up, and laid out while the one before is scored.
    """

    def __init__(self, settings: Settings, run: Run) -> None:
        torch.set_num_threads(1)
        self._plan = plan_scores(settings)
        self._model, _ = load_model(self._plan.checkpoint.path, self._plan.device)
        self._sequences = SequenceTable(settings.path("tables", "sequences"), self._plan.schema)
        warm_up(Answers(self._plan, Budget(self._model, self._plan.batch_bytes), None, {}), None, run)
        self._begun, self._nothing = 0.0, pa.table({})

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The score rows, with the times between which they were made; none once there is enough to tell the rate."""
        if not self._begun:
            self._scored(rows)
            self._begun = time.time()
        begun, cpu_s = time.time(), time.process_time()
        if begun - self._begun > _SCRATCH_S:
            return self._nothing
        scored = self._scored(rows)
        clocks = {"begun": begun, "done": time.time(), "cpu_s": time.process_time() - cpu_s, "actor": os.getpid()}
        times = {name: pa.array(np.full(len(rows), x)) for name, x in clocks.items()}
        told = pa.table({**{name: scored[name] for name in scored.column_names}, **times})
        self._nothing = told.slice(0, 0)
        return told

    @torch.inference_mode()
    def _scored(self, rows: pa.Table) -> pa.Table:
        schema = self._plan.schema
        requests = requests_of(rows.select(schema.requests_arrow().names), schema)
        histories = self._sequences.get(requests.user_id_R.unique())
        row_R = rows_of_requests(histories, requests)
        questions = Questions(histories, row_R, requests.history_end_R, requests.request_ts_R)
        packed = Packed.of(self._model, questions, requests.candidates, 1)
        output_CT = np.empty((len(requests.item_id_C), len(self._model.tasks)), np.float32)
        with computing_in(self._plan.precision, self._plan.device):
            score_packed(packed, _cost(packed), batch_cost(self._plan.device), output_CT)
        return score_rows(requests, to_scores(output_CT, self._model.tasks), schema)


def _cost(packed: Packed) -> Int64:
    return packed.num_events_P + packed.num_candidates_P


def from_scratch(settings: Settings, num_requests: int) -> float:
    """Scores per second of whole users' first requests on as many actors as the job has: from the first batch begun to the last
    one scored.

    On a CPU, per second of their processes.
    """
    output, pool = settings.path("from_scratch"), settings.batch_score
    remove_tree(output)
    requests = Table(settings.path("tables", "requests")).require("jobs.build_requests")
    rows = ray.data.read_parquet(requests.files("split=test/"), partitioning=None).limit(num_requests)
    rows.repartition(-(-num_requests // _MAP_REQUESTS[pool.device])).map_batches(  # one block would be one actor's
        FromScratch,
        fn_constructor_args=(settings, Run(output)),
        batch_size=_MAP_REQUESTS[pool.device],
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=pool.concurrency[1]),
        **scorer_options(pool, settings.ray),
    ).write_parquet(output)
    written = pq.read_table(output, partitioning=None)
    num_actors = len(written["actor"].unique())
    if num_actors < pool.concurrency[1]:
        raise RuntimeError(f"from scratch: {num_actors} actors had something to do: give --scratch-requests")
    seconds = pa.compute.max(written["done"]).as_py() - pa.compute.min(written["begun"]).as_py()
    if pool.device == "cpu":
        seconds = sum(written.group_by("begun").aggregate([("cpu_s", "max")])["cpu_s_max"].to_pylist())
    return len(written["item_id"].combine_chunks().flatten()) / seconds


def bare_loops(settings: Settings, device: str) -> dict[str, Loop]:
    """The model alone over test requests that lie on the device, in batches of several sizes; and as the job scores chunks.

    Each has run once.
    """
    plan = plan_scores(settings)
    model, _ = load_model(plan.checkpoint.path, device)
    assert isinstance(model, Longer)
    sequences = SequenceTable(settings.path("tables", "sequences"), plan.schema, plan.sequences.id)
    reader = Reader(plan, sequences, Run(""), model.windows, outputs_a_request=1, bytes_a_request=1)
    chunks = list(_first_chunks(reader, sequences.buckets))
    budget = Budget(model, settings.batch_score.batch_bytes)

    def appended() -> int:
        return sum(len(_scored(chunk, budget)) for chunk in chunks)

    def computed(loop: Loop) -> Loop:
        def run() -> int:
            with computing_in(plan.precision, device), torch.inference_mode():
                return loop()

        run()
        return run

    sizes = (batch_cost(device) // 4, batch_cost(device)) if device == "cuda" else (batch_cost(device),)
    loops = {f"packs laid out on the device before, {size >> 10} k events and candidates a batch": _packed(model, chunks, size)
             for size in sizes}  # fmt: skip
    loops["the job's scoring of chunks"] = appended
    named = {f"bare loop: {name}": loop for name, loop in loops.items()} | {
        SCRATCH_LOOP: _alone(model, chunks[0], sizes[-1])
    }
    return {name: computed(loop) for name, loop in named.items()}


def loop_rate(loop: Loop, device: str) -> float:
    """Scores per second, of some seconds; on a CPU, per second of this process."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    started, num_scores, seconds = clock(), 0, 0.0
    while seconds < _LOOP_S:
        num_scores += loop()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = clock() - started
    return num_scores / seconds


def _scored(chunk: Chunk, budget: Budget) -> Float32:
    assert chunk.requests
    return score_lists(chunk.questions, chunk.requests.candidates, budget)


def _first_chunks(reader: Reader, buckets: list[int]) -> Iterator[Chunk]:
    """Until they have candidates enough."""
    num_candidates = 0
    for bucket in buckets:
        for chunk in reader.bucket(bucket)[1]:
            assert chunk.requests
            yield chunk
            num_candidates += len(chunk.requests.item_id_C)
            if num_candidates >= _LOOP_CANDIDATES:
                return


def _packed(model: Longer, chunks: list[Chunk], most: int) -> Loop:
    """The chunks' requests in packs as the job makes them, of which nothing but the model's pass is left to do."""
    passes = []
    for chunk in chunks:
        assert chunk.requests
        packed = Packed.of(model, chunk.questions, chunk.requests.candidates, PACK_REQUESTS)
        passes += [run for _, run in packed.passes(_cost(packed), most)]
    return lambda: sum(len(run()) for run in passes)


def _alone(model: Longer, chunk: Chunk, most: int) -> Loop:
    """The same for some requests, each with a history of its own."""
    assert chunk.requests
    some = np.arange(min(len(chunk.questions), _ALONE_REQUESTS))
    packed = Packed.of(model, chunk.questions.take(some), candidates_of(chunk.requests.candidates, some)[1], 1)
    passes = [run for _, run in packed.passes(_cost(packed), most)]
    return lambda: sum(len(run()) for run in passes)
