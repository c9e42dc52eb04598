"""What the job is compared with: each request from scratch in Ray Data, and bare loops over what is in memory."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from longer.arrays import Float32, RequestBatch
from longer.config import Settings
from longer.data.batches import rows_of_requests
from longer.data.columns import requests_of
from longer.data.scores import score_rows
from longer.data.tables import RequestTable, SequenceTable
from longer.model.inputs import to_tensors
from longer.model.longer import Longer
from longer.model.outputs import to_scores
from longer.serving.batch_answers import computing_in
from longer.serving.batch_input import Chunk, Reader
from longer.serving.batch_output import Run
from longer.serving.batch_plan import plan_scores
from longer.serving.offline import score_lists
from longer.serving.packed import Packed
from longer.serving.questions import Budget
from longer.storage import Table, remove_tree
from longer.training.checkpoints import load_model
from longer.training.loader import COST_PER_BATCH, SplitData, score_packs

PACK_REQUESTS = 256
_MAP_REQUESTS = 256
_LOOP_CANDIDATES = 1 << 21
"""About how many candidates the bare loops score: a rate needs no more."""

_LOOP_S = 2

Loop = Callable[[], int]
"""Scores what is in memory; how many scores that are."""


def batch_cost(device: str) -> int:
    """Events and candidates of a batch of the training pass: what fills a GPU, or a CPU's caches."""
    return 1 << 20 if device == "cuda" else COST_PER_BATCH


class FromScratch:
    """Scores each request on a history of its own, as a job without states would; one instance an actor."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(1)
        self._plan = plan_scores(settings)
        self._model, _ = load_model(self._plan.checkpoint.path, self._plan.device)
        self._sequences = SequenceTable(settings.path("tables", "sequences"), self._plan.schema)
        self._is_warm = self._plan.device == "cpu"

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The score rows, with the times between which they were made; on a GPU, kernels are compiled before that."""
        if not self._is_warm:
            self._scored(rows)
            self._is_warm = True
        begun, cpu_s = time.time(), time.process_time()
        scored = self._scored(rows)
        clocks = {"begun": begun, "done": time.time(), "cpu_s": time.process_time() - cpu_s}
        times = {name: pa.array(np.full(len(rows), x)) for name, x in clocks.items()}
        return pa.table({**{name: scored[name] for name in scored.column_names}, **times})

    def _scored(self, rows: pa.Table) -> pa.Table:
        schema = self._plan.schema
        requests = requests_of(rows.select(schema.requests_arrow().names), schema)
        histories = self._sequences.get(requests.user_id_R.unique())
        data = SplitData(histories, requests, rows_of_requests(histories, requests), self._model.windows)
        output_CT = np.empty((len(requests.item_id_C), len(self._model.tasks)), np.float32)
        for rows_N, outputs_NT in score_packs(data, data.packs(1), self._forward, batch_cost(self._plan.device)):
            output_CT[rows_N] = outputs_NT
        return score_rows(requests, to_scores(output_CT, self._model.tasks), schema)

    @torch.inference_mode()
    def _forward(self, batch: RequestBatch) -> Float32:
        with computing_in(self._plan.precision, self._plan.device):
            return self._model(to_tensors(batch, self._plan.device)).float().cpu().numpy()


def pool_has_gpus(settings: Settings) -> bool:
    return settings.batch_score.num_gpus_per_scorer > 0


def from_scratch(settings: Settings, num_requests: int) -> float:
    """Scores per second of whole users' first requests on one actor: from the first batch begun to the last one written.

    On a CPU, per second of its process.
    """
    output = settings.path("from_scratch")
    remove_tree(output)
    requests = Table(settings.path("tables", "requests")).require("jobs.build_requests")
    rows = ray.data.read_parquet(requests.files("split=test/"), partitioning=None).limit(num_requests)
    rows.map_batches(
        FromScratch,
        fn_constructor_args=(settings,),
        batch_size=_MAP_REQUESTS,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        num_gpus=1 if pool_has_gpus(settings) else None,
    ).write_parquet(output)
    written = pq.read_table(output, partitioning=None)
    seconds = pa.compute.max(written["done"]).as_py() - pa.compute.min(written["begun"]).as_py()
    if not pool_has_gpus(settings):
        seconds = sum(written.group_by("begun").aggregate([("cpu_s", "max")])["cpu_s_max"].to_pylist())
    return len(written["item_id"].combine_chunks().flatten()) / seconds


def bare_loops(settings: Settings, device: str) -> dict[str, Loop]:
    """The model alone over test requests that lie on the device, in batches of several sizes; and as the job scores chunks.

    Each has run once.
    """
    plan = plan_scores(settings)
    model, _ = load_model(plan.checkpoint.path, device)
    assert isinstance(model, Longer)
    requests = RequestTable(settings.path("tables", "requests"), plan.schema)
    sequences = SequenceTable(settings.path("tables", "sequences"), plan.schema, plan.sequences.id)
    reader = Reader(plan, sequences, requests, Run(""), model.windows, 1)
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
    return {f"bare loop: {name}": computed(loop) for name, loop in loops.items()}


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
        for chunk in reader.chunks(bucket):
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
        passes += [run for _, run in packed.passes(packed.num_events_P + packed.num_candidates_P, most)]
    return lambda: sum(len(run()) for run in passes)
