"""One arm, trained and measured: the trainer's own steps over the same packs, in one process and without Ray.

C candidates.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.quality_study.arms import UNDO, Arm, Base, model_settings
from benchmarks.quality_study.data import Log
from longer.arrays import Int64
from longer.model.encoders.factory import make_model, upstream_settings
from longer.model.encoders.ranker import EncoderRanker
from longer.model.inputs import to_tensors
from longer.model.longer import Longer
from longer.model.ranker import Ranker
from longer.model_settings import ModelSettings
from longer.training.baselines import count_in_history, item_counts, popularity
from longer.training.cursor import MIN_PACKS_OF_STEP, DataCursor
from longer.training.loader import SplitData, largest_batch, prefetch, score_split
from longer.training.metrics import auc, binary_metrics
from longer.training.steps import Stepper, rate_share
from longer.training_settings import TaskSettings, TrainSettings

_PACK_REQUESTS = 16
_COUNTED_CANDIDATES = 64
TASKS = (TaskSettings(),)


@dataclass(frozen=True)
class Budget:
    """How much every arm is trained and tested: the newest training requests, and test requests spread over users and time."""

    train_requests: int
    requests_per_step: int
    test_requests: int
    valid_requests: int
    device: torch.device

    def train_settings(self, embedding_rate: float | None) -> TrainSettings:
        precision = "bf16" if self.device.type == "cuda" else "float32"
        rate = {} if embedding_rate is None else {"embedding_learning_rate": embedding_rate}
        return TrainSettings(precision=precision, **rate)


def run(arm: Arm, base: Base, log: Log, budget: Budget, embedding_rate: float | None) -> dict[str, Any]:
    """The arm's record: its settings, sizes, metrics on validation and test, and what it cost. A `tuning` arm is not tested."""
    settings = model_settings(arm, base)
    asked = budget.train_settings(embedding_rate)
    torch.manual_seed(arm.seed)
    model, upstream_seconds = make_model(settings, log.schema, TASKS), 0.0
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
    stepper, trained = _train(model, log, budget, arm, asked)
    train_seconds = time.perf_counter() - started
    if arm.score_length:
        settings = model_settings(replace(arm, length=arm.score_length), base)
        longer_window = make_model(settings, log.schema, TASKS).to(budget.device)
        longer_window.load_state_dict(model.state_dict())
        stepper.model = longer_window
    started = time.perf_counter()
    most = {"valid": budget.valid_requests} | ({"test": budget.test_requests} if arm.group != "tuning" else {})
    scores = {split: _scored(stepper, log, split, settings, requests) for split, requests in most.items()}
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
        **{split: _metrics(*scored, base.long_from) for split, scored in scores.items()},
        **trained,
        "embedding_rate": asked.embedding_learning_rate,
        "dense_parameters": sum(p.numel() for p in model.dense_parameters()),
        "forward_flops": _forward_flops(log, settings),
        "train_requests": min(budget.train_requests, len(log.requests["train"])),
        "epochs": arm.epochs,
        "train_s": train_seconds,
        "upstream_s": upstream_seconds,
        "test_s": time.perf_counter() - started,
    }


@torch.no_grad()
def undo(model: Ranker, what: str) -> None:
    """LONGER as it began before: with torch's own first weights, all tables alike, and every pair of channels turned."""
    assert isinstance(model, Longer)
    own, block = model.embedding, model.layers[0]
    every = what == UNDO[-1]
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
    if every or what == "all pairs turn":
        for layer in model.layers:
            layer.rotation.num_turned = layer.rotation.head_width // 2


def _train(model: Ranker, log: Log, budget: Budget, arm: Arm, asked: TrainSettings) -> tuple[Stepper, dict[str, float]]:
    """The model in its stepper as the pass that validated best left it; steps, passes kept, and the last tenth's mean loss."""
    device, seed = budget.device, arm.seed
    data = log.split("train", model.windows).newest(budget.train_requests)
    packs = data.packs(_PACK_REQUESTS)
    candidates_P = data.num_candidates(packs)
    cost_P = data.cost(packs)
    tokens_per_step = int(cost_P.sum() * budget.requests_per_step // len(data.requests))
    epochs = [np.arange(len(packs))] * arm.epochs
    cursor = DataCursor(
        f"{log.name}/{seed}", cost_P, epochs, max(tokens_per_step, MIN_PACKS_OF_STEP * int(cost_P.max()))
    )
    model.to(device).train()
    largest = largest_batch(data.sizes(packs), (cursor.plan(epoch, 1) for epoch in range(arm.epochs)))
    stepper = Stepper(model, asked, device, num_workers=1, largest=largest)
    num_steps, losses, step = cursor.num_steps, [], 0
    best: tuple[float, int, dict[str, Tensor]] = (-1.0, 0, {})
    for epoch in range(arm.epochs):
        plan = cursor.plan(epoch, 1)
        chosen = (plan.step(s) for s in range(cursor.steps_of(epoch)))
        batches = ((stepper.staged(data.batch(packs.take(some))), int(candidates_P[some].sum())) for some in chosen)
        for batch, num_candidates in prefetch(batches, 4):
            stepper.optimizer.set_rate_share(rate_share(step, num_steps, asked.warmup_share))
            torch.manual_seed((seed << 32) + step)
            loss, _ = stepper.step([batch], [1.0], num_candidates)
            losses.append(loss / num_candidates)
            step += 1
        if arm.epochs > 1:
            scored, output_C = _scored(stepper, log, "valid", model.settings, budget.valid_requests)
            found = auc(output_C, scored.requests.labels["label"])
            if found > best[0]:
                best = found, epoch + 1, {name: x.clone() for name, x in model.state_dict().items()}
    if best[2]:
        model.load_state_dict(best[2])
    final_loss = float(torch.stack(losses[-max(1, num_steps // 10) :]).mean())
    return stepper, {"steps": num_steps, "passes_kept": best[1] or arm.epochs, "final_loss": final_loss}


def _scored(stepper: Stepper, log: Log, split: str, settings: ModelSettings, most: int) -> tuple[SplitData, np.ndarray]:
    data = log.split(split, settings.windows).spread(most)
    return data, score_split(data, stepper.outputs, 1)[:, 0]


def _metrics(data: SplitData, output_C: np.ndarray, long_from: int) -> dict[str, float]:
    """Of all rows, and of those whose history is long."""
    requests, label_C = data.requests, data.requests.labels["label"]
    long_C = np.repeat(requests.history_end_R, np.diff(requests.candidates.offsets_R1)) >= long_from
    return {
        **binary_metrics(output_C, label_C, data.row_C).as_dict(),
        "long_auc": auc(output_C[long_C], label_C[long_C]),
        "rows": len(label_C),
        "long_rows": int(long_C.sum()),
    }


def baselines(log: Log, budget: Budget, settings: ModelSettings, long_from: int) -> dict[str, dict[str, float]]:
    """AUC of popularity and of the user's own counts, on the test rows of every arm."""
    data = log.split("test", settings.windows).spread(budget.test_requests)
    requests, label_C = data.requests, data.requests.labels["label"]
    item_C: Int64 = requests.candidates.features["item_id"]
    end_C = np.repeat(requests.history_end_R, np.diff(requests.candidates.offsets_R1))
    lasts = (20, 100, 1000, None)
    counts = count_in_history(log.histories, data.row_C, end_C, item_C, lasts)
    scores = {"popularity": popularity([item_counts(log.histories, log.valid_from_ms)], item_C)}
    scores |= {f"count_last_{n}" if n else "count_all": count for n, count in zip(lasts, counts, strict=True)}
    is_long = end_C >= long_from
    return {
        name: {"auc": auc(score, label_C), "long_auc": auc(score[is_long], label_C[is_long])}
        for name, score in scores.items()
    }


@torch.no_grad()
def _forward_flops(log: Log, settings: ModelSettings) -> dict[str, float]:
    """Counted on a CPU, in plain torch: of the test requests without very many candidates, the one with the longest history."""
    data = log.split("test", settings.windows)
    sizes_R = np.diff(data.requests.candidates.offsets_R1)
    longest = np.argmax(np.where(sizes_R <= _COUNTED_CANDIDATES, data.requests.history_end_R, -1))
    one = data.take(np.array([longest]))
    batch = to_tensors(one.batch(one.packs(1)))
    model = make_model(settings, log.schema, TASKS).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted on a CPU
        model(batch)
    return {
        "flops": float(counter.get_total_flops()),
        "candidates": int(sizes_R[longest]),
        "events": len(batch.histories.event_ts_E),
    }
