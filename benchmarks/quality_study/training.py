"""One arm, trained and measured: the trainer's own steps over the same requests, in one process and without Ray.

Every arm of a log takes the same steps, each of the same requests: runs of one user's requests, shuffled. How many packs and
batches they make depends on an arm's windows and memory, and changes nothing in what a step learns from.

R requests, P packs, S steps, N batches of a step, C candidates.
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.quality_study.arms import ITSELF, UNDO, Arm, Base, Trained, model_settings
from benchmarks.quality_study.control import NoHistory
from benchmarks.quality_study.draws import auc_of_draws
from benchmarks.quality_study.log import Log
from longer.arrays import Candidates, Int64
from longer.data.batches import Packs, plan_packs
from longer.model.attention import Rotation
from longer.model.encoders.factory import make_model, upstream_settings
from longer.model.encoders.hstu import HstuLayer
from longer.model.encoders.ranker import EncoderRanker
from longer.model.inputs import to_tensors
from longer.model.longer import Longer
from longer.model.ranker import Ranker
from longer.model_settings import ModelSettings
from longer.training.baselines import count_in_history, item_counts, popularity
from longer.training.cursor import EpochPlan, divide
from longer.training.loader import SplitData, largest_batch, prefetch, score_split
from longer.training.metrics import auc, binary_metrics
from longer.training.steps import StepBatch, Stepper, rate_share
from longer.training_settings import TaskSettings, TrainSettings

_RUN_REQUESTS = 16
_BATCH_COST = 1 << 15
"""Events and candidates that encoders compute at once; LONGER takes whole steps."""
_SMALL = ("longer", ITSELF, "none", "sum_pooling")
"""They keep no number for every candidate and event; the others would fill a card that processes share."""
TASKS = (TaskSettings(),)


@dataclass(frozen=True)
class Budget:
    """How much every arm is trained and tested: the newest training requests, and test requests spread over users and time."""

    train_requests: int
    requests_per_step: int
    test_requests: int
    valid_requests: int
    device: torch.device

    def train_settings(self, trained: Trained, encoder: str) -> TrainSettings:
        return TrainSettings(
            precision="bf16" if self.device.type == "cuda" else "float32",
            epochs=trained.passes,
            learning_rate=trained.dense,
            embedding_learning_rate=trained.tables,
            recompute=self.device.type == "cuda" and encoder not in _SMALL,
        )


def run(arm: Arm, base: Base, log: Log, budget: Budget, trained: Trained) -> dict[str, Any]:
    """The arm's record (settings, sizes, metrics, costs); what steers the study is not tested."""
    settings = model_settings(arm, base)
    asked = budget.train_settings(trained, arm.encoder)
    torch.manual_seed(arm.seed)
    model, upstream_seconds = _make(arm, settings, log), 0.0
    if arm.encoder == "user_embedding":
        started = time.perf_counter()
        tower = make_model(upstream_settings(settings), log.schema, TASKS)
        _train(tower, log, budget, arm, asked)
        upstream_seconds = time.perf_counter() - started
        assert isinstance(model, EncoderRanker)
        model.upstream.load_state_dict(tower.state_dict())
    if arm.undone:
        undo(model, arm.undone)
    started = time.perf_counter()
    stepper, found = _train(model, log, budget, arm, asked)
    train_seconds = time.perf_counter() - started
    if arm.score_length:
        settings = model_settings(replace(arm, length=arm.score_length), base)
        longer_window = make_model(settings, log.schema, TASKS).to(budget.device)
        longer_window.load_state_dict(model.state_dict())
        stepper.model = longer_window
    started = time.perf_counter()
    most = {"valid": budget.valid_requests} | ({"test": budget.test_requests} if arm.is_tested else {})
    splits = {split: _spread(log.split(split, settings.windows), requests) for split, requests in most.items()}
    scores = {split: score_split(data, stepper.outputs, 1)[:, 0] for split, data in splits.items()}
    return {
        "key": arm.key,
        "arm": arm.name,
        "log": arm.log,
        "group": arm.group,
        "seed": arm.seed,
        "encoder": arm.encoder,
        "features": arm.features,
        "length": arm.length or base.length,
        "window_events": settings.history_events,
        "stride_events": settings.windows.stride_events,
        "model": settings.model_dump(mode="json"),
        **{split: _metrics(data, scores[split], base.long_from) for split, data in splits.items()},
        **({"long_auc_draws": _long_draws(splits["test"], scores["test"], base.long_from)} if arm.is_compared else {}),
        **found,
        "trained": asdict(trained),
        "dense_parameters": sum(p.numel() for p in model.dense_parameters()),
        "table_parameters": sum(p.numel() for p in model.embedding_parameters()),
        **({"forward_flops": _forward_flops(log, arm, settings)} if arm.is_tested else {}),
        "train_requests": min(budget.train_requests, len(log.requests["train"])),
        "train_s": train_seconds,
        "upstream_s": upstream_seconds,
        "test_s": time.perf_counter() - started,
    }


def _make(arm: Arm, settings: ModelSettings, log: Log) -> Ranker:
    return NoHistory(settings, log.schema, TASKS) if arm.encoder == ITSELF else make_model(settings, log.schema, TASKS)


@torch.no_grad()
def undo(model: Ranker, what: str) -> None:
    """LONGER as it began before: with torch's own first weights, all tables alike, and every pair of channels turned."""
    assert isinstance(model, Longer)
    own, block = model.embedding, model.layers[0]
    every = what == UNDO[-1]
    if every or what == "values without the mark":
        block.key_value.weight[len(own.request_D) :] -= own.request_D / own.request_D.square().sum()
    if every or what == "first layer not a search":
        block.query.reset_parameters()
        block.key_value.reset_parameters()
    if every or what == "merge not concatenation":
        own.merge.reset_parameters()
    if every or what == "loud numbers":
        for linear in own.event_numbers.children():
            torch.nn.init.uniform_(linear.weight, -1, 1)
    if every or what == "quiet items":
        for table in (own.item, *own.item_categories.children()):
            torch.nn.init.normal_(table.embedding.weight, std=0.05)
    if every or what == "first layer turns":
        block.rotation.num_turned = Rotation(block.rotation.head_width).num_turned
    if every or what == "all pairs turn":
        for layer in model.layers:
            layer.rotation.num_turned = layer.rotation.head_width // 2


def _train(model: Ranker, log: Log, budget: Budget, arm: Arm, asked: TrainSettings) -> tuple[Stepper, dict[str, float]]:
    """The model in its stepper; steps, and the mean loss of the last tenth."""
    device, seed = budget.device, arm.seed
    data = log.split("train", model.windows)
    data = data.take(data.newest(budget.train_requests))
    run_R = _runs(data)
    packs = plan_packs(run_R, data.requests.history_end_R, model.windows, _RUN_REQUESTS)
    most_cost = None if arm.is_longer else _BATCH_COST
    plans = [_plan(data, packs, run_R, budget.requests_per_step, (seed, n), most_cost) for n in range(asked.epochs)]
    candidates_P = data.num_candidates(packs)
    model.to(device).train()
    stepper = Stepper(model, asked, device, num_workers=1, largest=largest_batch(data.sizes(packs), plans))
    steps = [(plan, step) for plan in plans for step in range(plan.num_steps)]
    ready = prefetch((_staged(stepper, data, packs, plan, step) for plan, step in steps), 4)
    losses = []
    for number, ((plan, step), batches) in enumerate(zip(steps, ready, strict=True)):
        stepper.optimizer.set_rate_share(rate_share(number, len(steps), asked.warmup_share))
        torch.manual_seed((seed << 32) + number)
        num_candidates = int(candidates_P[plan.step(step)].sum())
        loss, _ = stepper.step(batches, [1.0] * len(batches), num_candidates)
        losses.append(loss / num_candidates)
    final_loss = float(torch.stack(losses[-max(1, len(steps) // 10) :]).mean())
    return stepper, {"steps": len(steps), "final_loss": final_loss}


def _spread(data: SplitData, requests: int) -> SplitData:
    return data.take(data.spread(requests))


def _runs(data: SplitData) -> Int64:
    """[R]: each request's number among runs of one user's requests in time, whatever the windows."""
    order = np.lexsort((data.requests.request_id_R, data.requests.request_ts_R, data.row_R))
    new_user = np.diff(data.row_R[order], prepend=-1) != 0
    place = np.arange(len(order))
    place_of_user = place - np.maximum.accumulate(np.where(new_user, place, 0))
    run_R = np.empty(len(order), np.int64)
    run_R[order] = np.cumsum(place_of_user % _RUN_REQUESTS == 0) - 1
    return run_R


def _plan(
    data: SplitData, packs: Packs, run_R: Int64, requests_per_step: int, seed: tuple[int, int], most_cost: int | None
) -> EpochPlan:
    """Shuffled runs cut into steps by requests; a step's packs in as many batches as keep each near `most_cost`."""
    requests_of_run = np.bincount(run_R)
    shuffled = np.random.default_rng(seed).permutation(len(requests_of_run))
    step_of_run = np.empty(len(shuffled), np.int64)
    step_of_run[shuffled] = (np.cumsum(requests_of_run[shuffled]) - 1) // requests_per_step
    step_P, cost_P = step_of_run[run_R[packs.order_R[packs.offsets_P1[:-1]]]], data.cost(packs)
    cost_S = np.bincount(step_P, cost_P)
    num_batches = 1 if most_cost is None else int(-(-cost_S.max() // most_cost))
    batch_P = divide(cost_P, step_P, num_batches)
    order = np.lexsort((batch_P, step_P))
    number_P = (step_P * num_batches + batch_P)[order]
    return EpochPlan(order, np.searchsorted(number_P, np.arange(len(cost_S) * num_batches + 1)), num_batches)


def _staged(stepper: Stepper, data: SplitData, packs: Packs, plan: EpochPlan, step: int) -> list[StepBatch]:
    chosen = (plan.batch(step, number) for number in range(plan.num_batches))
    return [stepper.staged(data.batch(packs.take(some))) for some in chosen if len(some)]


def _metrics(data: SplitData, output_C: np.ndarray, long_from: int) -> dict[str, float]:
    """Of all rows, and of those whose history is long."""
    label_C, long_C = data.requests.labels["label"], _is_long(data, long_from)
    return {
        **binary_metrics(output_C, label_C, data.row_C).as_dict(),
        "long_auc": auc(output_C[long_C], label_C[long_C]),
        "rows": len(label_C),
        "long_rows": int(long_C.sum()),
    }


def _is_long(data: SplitData, long_from: int) -> np.ndarray:
    """[C]: whether a row's history is long."""
    requests = data.requests
    return np.repeat(requests.history_end_R, np.diff(requests.candidates.offsets_R1)) >= long_from


def _long_draws(data: SplitData, output_C: np.ndarray, long_from: int) -> list[float]:
    long_C = _is_long(data, long_from)
    return auc_of_draws(output_C[long_C], data.requests.labels["label"][long_C], data.row_C[long_C])


def baselines(log: Log, budget: Budget, settings: ModelSettings, long_from: int) -> dict[str, dict[str, Any]]:
    """AUC of popularity and of the user's own counts, on the test rows of every arm."""
    data = _spread(log.split("test", settings.windows), budget.test_requests)
    requests, label_C = data.requests, data.requests.labels["label"]
    item_C: Int64 = requests.candidates.features["item_id"]
    end_C = np.repeat(requests.history_end_R, np.diff(requests.candidates.offsets_R1))
    lasts = (20, 100, 1000, None)
    rows, row_C = np.unique(data.row_C, return_inverse=True)
    asked = log.histories.slice_events(rows, log.histories.first_index_B[rows], log.histories.end_index_B[rows])
    counts = count_in_history(asked, row_C, end_C, item_C, lasts)
    scores = {"popularity": popularity([item_counts(log.histories, log.valid_from_ms)], item_C)}
    scores |= {f"count_last_{n}" if n else "count_all": count for n, count in zip(lasts, counts, strict=True)}
    is_long = _is_long(data, long_from)
    found: dict[str, dict[str, Any]] = {
        name: {"auc": auc(score, label_C), "long_auc": auc(score[is_long], label_C[is_long])}
        for name, score in scores.items()
    }
    found["count_all"]["long_auc_draws"] = _long_draws(data, scores["count_all"], long_from)
    return found


def sizes_of(log: Log, budget: Budget) -> dict[str, int]:
    """Of the whole log, and the requests that arms are tested on."""
    lengths = np.diff(log.histories.offsets_B1)
    tested = min(budget.test_requests, len(log.requests["test"]))
    return {"users": len(lengths), "events": int(lengths.sum()), "longest": int(lengths.max()), "tested": tested}


@torch.no_grad()
def _forward_flops(log: Log, arm: Arm, settings: ModelSettings) -> dict[str, float]:
    """Counted on a CPU, in plain torch: of the test request with the longest history, with as many candidates as requests have."""
    data = log.split("test", settings.windows)
    mean = round(float(np.diff(data.requests.candidates.offsets_R1).mean()))
    one = data.take(np.array([np.argmax(data.requests.history_end_R)]))
    asked = one.batch(one.packs(1))
    again = np.arange(mean) % len(asked.candidates.features["item_id"])
    features = {name: values[again] for name, values in asked.candidates.features.items()}
    batch = to_tensors(replace(asked, candidates=Candidates(np.array([0, mean]), features), labels={}))
    model = _make(arm, settings, log).eval()
    for layer in model.modules():
        if isinstance(layer, HstuLayer):  # all pairs at once, as in the Transformer's attention
            layer.block_events = settings.windows.max_history_events
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted on a CPU
        model(batch)
    return {
        "flops": float(counter.get_total_flops()),
        "candidates": mean,
        "events": len(batch.histories.event_ts_E),
    }
