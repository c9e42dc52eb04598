"""How fast the model trains and scores, against plain PyTorch: python -m benchmarks.model_speed [--width 512] [--only score]

One run on one device; on a CPU a small size. Training, with the same weights, data and mathematics in every arm (checked first):

    per impression   one impression a row, histories padded to the batch's longest, dense mask, PyTorch's attention
    shared padded    the candidates of a request share the encode; padded, dense mask; compiled on CUDA
    ours             upload, forward, backward, clipping and AdamW, kernel by kernel, as `jobs.train` runs the model
    ours captured    the same with forward and backward as one CUDA graph (batches filled to the sizes of the largest)

Scoring: candidates of users whose states are ready, a batch's states gathered beforehand; `score` is the function that serving
calls, from NumPy to NumPy with the gathering; `graph` a CUDA graph of the model's part. Prints Markdown; last, one JSON line.

Model FLOPs are those of real tokens' matrix products (`training_flops`), three times the forward pass's. B requests of one history
each, L events, K events in a group, G groups (padded), Q query tokens, C candidates of a request, d event width, D width.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longer.arrays import NO_EVENT_TS, Candidates, Histories, RequestBatch
from longer.config import ModelSettings, TaskSettings, TrainSettings
from longer.model.attention import Block
from longer.model.captured import CapturedPass
from longer.model.inputs import RequestTensors, feature_tensors, to_tensors
from longer.model.interactions import InteractionIndex
from longer.model.layout import Sizes
from longer.model.longer import Longer
from longer.model.states import encode, gather, score
from longer.model.visibility import CANDIDATE, GLOBAL, GROUP, visible
from longer.schema import EventSchema, Feature
from longer.training.steps import loss_sum, make_optimizer

SCHEMA = EventSchema(features=(Feature(name="category", kind="categorical", of="item"),), tasks=("click",))
TASKS = (TaskSettings(name="click"),)
NOW = 1_700_000_000_000
ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")


def model_settings(event_width: int, history_events: int, small: bool = False) -> ModelSettings:
    if small:
        return ModelSettings(
            history_events=history_events,
            merge_size=4,
            event_width=event_width,
            query_groups=16,
            stride_groups=8,
            item_rows=5_000,
        )
    return ModelSettings(
        history_events=history_events,
        merge_size=8,
        event_width=event_width,
        query_groups=100,
        stride_groups=25 if history_events == 1_000 else 50,  # 1,000 events are not a multiple of 50 groups of 8
        num_heads=4,
        num_self_layers=3,
        item_rows=2_000_000,
        user_rows=100_000,
    )


# -- data -------------------------------------------------------------------------------------------------------------


def zipf_lengths(rng: np.random.Generator, num_users: int, longest: int) -> np.ndarray:
    """P(length > x) = x0/x from x0 = longest/20 on, cut at `longest`, which one user of the batch has: the mean is a fifth."""
    lengths = np.minimum(longest, longest / 20 / (1 - rng.random(num_users))).astype(np.int64)
    lengths[rng.integers(num_users)] = longest
    return lengths


def random_batch(rng: np.random.Generator, lengths: np.ndarray, num_candidates: int) -> RequestBatch:
    """One request a user, at the end of a history that starts at event 0."""
    total, num_users = int(lengths.sum()), len(lengths)
    offsets = np.append(0, np.cumsum(lengths))

    def keys(n: int, rows: int) -> np.ndarray:
        return (rows / (1 + rng.random(n) * rows)).astype(np.int64) * 7_919 + 1  # few popular ones, many rare ones

    events = {"item_id": keys(total, 2_000_000), "action": keys(total, 4), "category": keys(total, 2_000)}
    asked = num_users * num_candidates
    candidates = {"item_id": keys(asked, 2_000_000), "category": keys(asked, 2_000)}
    event_ts = NOW - 1_000_000_000 + np.sort(rng.integers(0, 10**9, total))
    rows = np.arange(num_users)
    return RequestBatch(
        Histories(rng.integers(1, 2**62, num_users), offsets, rows * 0, rows * 0 + NO_EVENT_TS, event_ts, events),
        rows,
        lengths,
        rows * 0 + NOW + 1000,
        Candidates(np.arange(num_users + 1) * num_candidates, candidates),
        rows,
        {"click": rng.integers(0, 2, asked).astype(np.float32)},
    )


def per_impression(batch: RequestBatch, num_rows: int) -> RequestBatch:
    """The first impressions of the batch, each with a copy of its history."""
    user_N = np.repeat(batch.row_R, np.diff(batch.candidates.offsets_R1))[:num_rows]
    rows = np.arange(num_rows)
    starts = batch.histories.first_index_B[user_N]
    return RequestBatch(
        batch.histories.slice_events(user_N, starts, batch.history_end_R[user_N]),
        rows,
        batch.history_end_R[user_N],
        batch.request_ts_R[user_N],
        Candidates(np.arange(num_rows + 1), {n: x[:num_rows] for n, x in batch.candidates.features.items()}),
        rows,
        {name: x[:num_rows] for name, x in batch.labels.items()},
    )


# -- plain PyTorch ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Padded:
    """A batch as a plain trainer has it: every history padded to the longest, on the device."""

    features: dict[str, Tensor]
    event_ts_BL: Tensor
    previous_ts_BL: Tensor
    length_B: Tensor
    user_key_B: Tensor
    request_ts_B: Tensor
    candidates: dict[str, Tensor]
    counts_CF: Tensor
    labels: dict[str, Tensor]


def pad(model: Longer, batch: RequestBatch) -> Padded:
    """Padded to a whole number of groups; counts of candidates are given, which spares this arm their cost."""
    tensors, merge_size = to_tensors(batch, DEVICE), model.windows.merge_size
    histories = tensors.histories
    lengths, row_E = histories.num_events_B, histories.row_E
    longest = -(-int(lengths.max()) // merge_size) * merge_size
    slot_E = torch.arange(len(row_E), device=DEVICE) - histories.offsets_B1[row_E]

    def padded(values_E: Tensor) -> Tensor:
        out = values_E.new_zeros(len(lengths), longest)
        out[row_E, slot_E] = values_E
        return out

    request_C = tensors.request_of_candidate_C
    fields = [tensors.candidates[name] for name in model.interaction_fields]
    counts_CF = InteractionIndex.build(histories, model.interaction_fields).features(
        request_C,
        histories.first_index_B[request_C],
        tensors.history_end_R[request_C],
        tensors.request_ts_R[request_C],
        torch.stack(fields, dim=-1),
        model.settings.count_events,
        torch.float32,
    )
    return Padded(
        {name: padded(x) for name, x in histories.features.items()},
        padded(histories.event_ts_E),
        padded(histories.previous_ts_E()),
        lengths,
        histories.user_key_B,
        tensors.request_ts_R,
        tensors.candidates,
        counts_CF,
        tensors.labels,
    )


def padded_forward(model: Longer, batch: Padded, num_query_groups: int) -> Tensor:
    """[B*C, tasks]: LONGER as a plain implementation has it, `visible` as one dense mask."""
    embedding, windows, num_users = model.embedding, model.windows, len(batch.length_B)
    merge_size, device = windows.merge_size, batch.length_B.device
    exists_BL = torch.arange(batch.event_ts_BL.shape[1], device=device) < batch.length_B[:, None]
    x_BLd = embedding._events(batch.features, batch.event_ts_BL, batch.previous_ts_BL)
    in_groups = x_BLd.unflatten(1, (-1, merge_size)).flatten(0, 1)
    x_BGD = embedding.groups(in_groups, exists_BL.view(-1, merge_size)).unflatten(0, (num_users, -1))
    num_groups = x_BGD.shape[1]
    asked_B, query_first_B = windows.num_groups(batch.length_B), windows.query_start(batch.length_B)
    query_BQ = query_first_B[:, None] + torch.arange(num_query_groups, device=device)
    inside_BQ = query_BQ.clamp_max(num_groups - 1)
    window_BQD = x_BGD.gather(1, inside_BQ[..., None].expand(-1, -1, x_BGD.shape[-1]))

    last = batch.event_ts_BL.gather(1, (batch.length_B - 1)[:, None])[:, 0]
    x_CD = embedding.candidates(batch.candidates).unflatten(0, (num_users, -1))
    x_CD = x_CD + embedding.requests(batch.request_ts_B, last)[:, None]
    x_CD = x_CD + model.interaction_token(batch.counts_CF).unflatten(0, (num_users, -1))
    globals_BMD = embedding.user_globals(batch.user_key_B)
    num_candidates = x_CD.shape[1]
    own_BXD = torch.cat([globals_BMD, x_CD.to(globals_BMD.dtype)], dim=1)
    kinds = [GLOBAL] * globals_BMD.shape[1] + [CANDIDATE] * num_candidates
    kind_X = torch.tensor(kinds, device=device)
    number_BX = torch.arange(len(kinds), device=device).expand(num_users, -1)
    group_BG = torch.arange(num_groups, device=device).expand(num_users, -1)

    def tokens(groups_BG: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Kind, index, position and existence of some groups and then the user's and candidates' tokens."""
        kind = torch.cat([kind_X.new_full((groups_BG.shape[1],), GROUP), kind_X])
        position = torch.cat([groups_BG, asked_B[:, None].expand(-1, len(kinds))], dim=1)
        exists = torch.cat([groups_BG < asked_B[:, None], torch.ones_like(number_BX, dtype=torch.bool)], dim=1)
        return kind, torch.cat([groups_BG, number_BX], dim=1), position, exists

    def mask(query: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> Tensor:
        seen = visible(query[0][:, None], query[1][:, :, None], key[0], key[1][:, None])
        return seen & (key[3][:, None] | ~query[3][:, :, None])  # padding sees padding, not nothing

    all_groups, window = tokens(group_BG), tokens(query_BQ)
    x_BQD = torch.cat([window_BQD.to(own_BXD.dtype), own_BXD], dim=1)
    for number, layer in enumerate(model.blocks):
        block = layer if isinstance(layer, Block) else None
        assert block is not None
        keys_of, x_key = (
            (all_groups, torch.cat([x_BGD.to(own_BXD.dtype), own_BXD], 1)) if number == 0 else (window, x_BQD)
        )
        query_of = window
        key, value = block.keys_values(x_key, keys_of[2])
        if number == len(model.blocks) - 1:
            x_BQD = x_BQD[:, -num_candidates:]
            query_of = window[0][-num_candidates:], *(x[:, -num_candidates:] for x in window[1:])
        query = block.queries(x_BQD, query_of[2])
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask(query_of, keys_of)[:, None],
        )
        x_BQD = block.finish(x_BQD, out.transpose(1, 2).flatten(-2))
    return model.leave(x_BQD.flatten(0, 1), batch.counts_CF, batch.candidates["item_id"])


# -- counting ---------------------------------------------------------------------------------------------------------


def training_flops(settings: ModelSettings, lengths: np.ndarray, num_candidates: int) -> float:
    """Additions and multiplications of a training step's matrix products over real tokens: forward, and twice that for gradients.

    Events: InnerTrans and the merge. Layers: projections, attention over the keys each query sees, feed-forward; the last layer
    projects keys of groups and globals but gathers for candidates only. No embeddings, norms or optimizer.
    """
    d, width, merge_size, ratio = settings.event_width, settings.width, settings.merge_size, settings.feed_forward_ratio
    windows, num_users, num_globals = settings.windows, len(lengths), settings.num_cls_tokens + 1
    asked = windows.num_groups(lengths)
    in_window = asked - windows.query_start(lengths)
    candidates = num_users * num_candidates
    inner = 2 * d * 3 * d + 2 * d * d + 2 * 2 * d * 2 * d + 4 * merge_size * d if settings.inner_transformer else 0
    flops = float(lengths.sum() * inner + asked.sum() * 2 * width**2 + candidates * (inner + 2 * width**2))
    query, keys, rest = 2 * width**2, 4 * width**2, 2 * width**2 + 4 * ratio * width**2
    num_features = 2 * (4 + len(settings.count_events)) if settings.interactions else 0
    flops += candidates * (2 * num_features * width + 2 * width**2 + 2 * (width + num_features) * 2 * width + 4 * width)
    for layer in range(settings.num_self_layers + 1):
        groups = asked if layer == 0 else in_window
        own = num_globals * num_users + candidates
        reading = candidates if layer == settings.num_self_layers else in_window.sum() + own
        flops += (groups.sum() + own) * keys + reading * (query + rest)
        seen = ((groups + num_globals + 1) * num_candidates).sum()
        if layer < settings.num_self_layers:
            seen += ((groups + num_globals) * num_globals).sum() + (in_window * (groups - (in_window - 1) / 2)).sum()
        flops += 4 * width * seen
    return 3 * float(flops)


def measured_rate() -> float:
    """FLOP/s of the device's own product of bfloat16 matrices (float32 on a CPU)."""
    size, dtype = (8192, torch.bfloat16) if ON_CUDA else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, 20)


def seconds(step: Callable[[], Any], num_steps: int, warm_up: int = 3) -> float:
    """Seconds a step, over `num_steps` steps without waiting in between."""
    for _ in range(warm_up):
        step()
    if ON_CUDA:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(num_steps):
        step()
    if ON_CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / num_steps


# -- training ---------------------------------------------------------------------------------------------------------


def autocast() -> torch.autocast:
    """The same flags as `CapturedPass` has: compiled functions are compiled once for each."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_CUDA, cache_enabled=False)


class Trainer:
    """One optimizer step on outputs from anywhere: the same loss, clipping and optimizer in every arm."""

    def __init__(self, model: Longer) -> None:
        self.model, self.optimizer = model, make_optimizer(model, TrainSettings())

    def step(self, outputs: Callable[[], Tensor], labels: dict[str, Tensor]) -> None:
        with autocast():
            output_CT = outputs()
        loss = loss_sum(output_CT, labels, TASKS) / len(output_CT)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.apply()

    def apply(self) -> None:
        """Clips the gradients and updates the weights."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def check_arms_agree() -> float:
    """The largest difference of the arms' float32 outputs on a small batch; fails if they compute different things."""
    torch.manual_seed(0)
    model = Longer(model_settings(8, 64, small=True), SCHEMA, TASKS).to(DEVICE).eval()
    batch = random_batch(np.random.default_rng(0), np.array([1, 7, 64, 60, 33, 50]), 5)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        ours = model(to_tensors(batch, DEVICE))
        shared = padded_forward(model, pad(model, batch), 24)
        alone = padded_forward(model, pad(model, per_impression(batch, 30)), 24)
    worst = max(float((ours - other).abs().max()) for other in (shared, alone))
    if worst > 1e-3:
        raise SystemExit(f"the arms compute different outputs: {worst:.1e} apart")
    return worst


def capture(model: Longer, batches: list[RequestBatch]) -> CapturedPass:
    room = Sizes(*map(max, zip(*(Sizes.of(batch, model.windows) for batch in batches), strict=True)))

    def loss(output_CT: Tensor, labels: dict[str, Tensor], exists_C: Tensor) -> Tensor:
        loss_C = F.binary_cross_entropy_with_logits(output_CT[:, 0].float(), labels["click"], reduction="none")
        return torch.where(exists_C, loss_C, 0).sum() / room.candidates

    return CapturedPass(model, loss, room, batches[0], torch.bfloat16)


def train_arms(
    settings: ModelSettings, num_users: int, num_candidates: int, is_zipf: bool, rate: float, arms: list[str]
) -> list[dict[str, Any]]:
    """Rows of the table: impressions/s and share of the device's rate of each arm on the same kind of batches."""
    torch.manual_seed(0)
    rng, longest = np.random.default_rng(1), settings.history_events
    model = Longer(settings, SCHEMA, TASKS).to(DEVICE)
    trainer, rows = Trainer(model), []
    lengths = [zipf_lengths(rng, num_users, longest) if is_zipf else np.full(num_users, longest) for _ in range(3)]
    batches = [random_batch(rng, lengths_B, num_candidates) for lengths_B in lengths]
    num_query_groups = settings.query_groups + settings.stride_groups
    for arm in arms:
        if arm.startswith("ours"):
            trainer.model.zero_grad(set_to_none=True)
            captured = capture(model, batches) if arm == "ours captured" else None

            def ours(number: int, captured: CapturedPass | None = captured) -> None:
                if captured is None:
                    tensors = to_tensors(batches[number], DEVICE)
                    trainer.step(lambda: model(tensors), tensors.labels)
                else:
                    captured(batches[number])
                    trainer.apply()

            step, impressions = ours, num_users * num_candidates
            flops = [training_flops(settings, x, num_candidates) for x in lengths]
        else:
            shared = arm == "shared padded"
            fewer = [per_impression(batch, max(32, num_users // 4)) for batch in batches]
            padded = [pad(model, batch) for batch in (batches if shared else fewer)]
            forward = torch.compile(padded_forward, dynamic=False) if shared and ON_CUDA else padded_forward

            def plain(number: int, padded: list[Padded] = padded, forward: Callable = forward) -> None:
                trainer.step(lambda: forward(model, padded[number], num_query_groups), padded[number].labels)

            step, impressions = plain, len(padded[0].candidates["item_id"])
            flops = [
                training_flops(settings, x if shared else one.history_end_R, num_candidates if shared else 1)
                for x, one in zip(lengths, fewer, strict=True)
            ]
        turn = iter(range(10**9))
        stance = "force_eager" if arm == "per impression" else "default"  # plain code gets none of our compiled pieces
        try:
            with torch.compiler.set_stance(stance):
                step_s = seconds(
                    lambda step=step, turn=turn: step(next(turn) % 3), 12 if ON_CUDA else 2, 6 if ON_CUDA else 1
                )
        except torch.OutOfMemoryError:
            print(f"out of memory: {arm}, {num_users} users of up to {longest} events", file=sys.stderr)
            continue
        print(f"{settings.width} {longest} {arm} {step_s * 1e3:.2f} ms", file=sys.stderr, flush=True)
        rows.append(
            {
                "width": settings.width, "L": longest, "lengths": "Zipf" if is_zipf else "full", "arm": arm,
                "impressions_per_step": impressions, "ms_per_step": step_s * 1e3, "impressions_per_s": impressions / step_s,
                "model_tflops": float(np.mean(flops)) / step_s / 1e12, "mfu": float(np.mean(flops)) / step_s / rate,
            }
        )  # fmt: skip
    return rows


# -- scoring ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def score_rows(settings: ModelSettings, users: list[int], candidates: list[int]) -> list[dict[str, Any]]:
    """Candidates/s from ready states of full histories: as serving calls it, and the model's part alone."""
    torch.manual_seed(0)
    rng, rows = np.random.default_rng(2), []
    model = Longer(settings, SCHEMA, TASKS).to(DEVICE).eval()
    with autocast():
        batch = random_batch(rng, np.full(max(users), settings.history_events), 1)
        all_states = encode(model, batch.histories)
        for num_users in users:
            states = all_states[:num_users]
            together = gather(model, states)
            for num_candidates in candidates:
                asked = random_batch(rng, np.ones(num_users, np.int64), num_candidates)
                requests = RequestTensors(
                    row_R=torch.arange(num_users, device=DEVICE),
                    history_end_R=together.num_events_B,
                    request_ts_R=torch.from_numpy(asked.request_ts_R).to(DEVICE),
                    candidate_offsets_R1=torch.from_numpy(asked.candidates.offsets_R1).to(DEVICE),
                    candidates=feature_tensors(asked.candidates, DEVICE),
                    labels={},
                )
                whole_s = seconds(lambda s=states, a=asked: score(model, s, a.request_ts_R, a.candidates), 5)
                eager_s = seconds(lambda r=requests, t=together: t.outputs(model, r), 10)
                graph_s = graph_seconds(lambda r=requests, t=together: t.outputs(model, r)) if ON_CUDA else eager_s
                total = num_users * num_candidates
                what = f"{settings.width} {settings.history_events} {num_users}x{num_candidates}"
                print(f"{what} {total / graph_s / 1e6:.2f} M/s", file=sys.stderr, flush=True)
                rows.append(
                    {
                        "width": settings.width, "L": settings.history_events, "users": num_users, "candidates": num_candidates,
                        "score_per_s": total / whole_s, "model_per_s": total / eager_s, "graph_per_s": total / graph_s,
                        "graph_ms": graph_s * 1e3,
                    }
                )  # fmt: skip
    return rows


def graph_seconds(call: Callable[[], Tensor]) -> float:
    """Seconds a replay; the replayed outputs must be the eager ones."""
    expected = call().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    return seconds(graph.replay, 50)


def table(rows: list[dict[str, Any]]) -> str:
    def shown(value: Any) -> str:
        return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") if isinstance(value, float) else str(value)

    lines = [" | ".join(rows[0]), "|".join("---" for _ in rows[0])]
    return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(map(shown, row.values())) for row in rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, choices=[256, 512], help="one width only")
    parser.add_argument("--only", choices=["train", "score"], help="one half")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if ON_CUDA else "CPU"
    print(
        f"# Model speed\n\n{name}; torch {torch.__version__}; arms differ by {check_arms_agree():.1e} at most in float32"
    )
    rate = measured_rate()
    print(f"matrix products: {rate / 1e12:.3g} TFLOP/s\n", flush=True)
    widths = [32, 64] if args.width is None else [args.width // 8]
    trained: list[dict[str, Any]] = []
    scored: list[dict[str, Any]] = []
    for event_width, longest in [(d, n) for d in widths for n in (2_000, 10_000)] if ON_CUDA else [(8, 256)]:
        settings = model_settings(event_width, longest, small=not ON_CUDA)
        num_users = (512 if longest <= 2_000 else 128) if ON_CUDA else 8
        if args.only != "score":
            for is_zipf in (True, False):
                arms = ["ours", *(["ours captured"] if ON_CUDA else []), "shared padded"]
                trained += train_arms(
                    settings, num_users, 32, is_zipf, rate, [*arms, *(["per impression"] if is_zipf else [])]
                )
    if trained:
        print(table(trained), flush=True)
    if args.only != "train":
        for event_width, longest in [(d, n) for d in widths for n in (1_000, 2_000, 10_000)] if ON_CUDA else [(8, 256)]:
            settings = model_settings(event_width, longest, small=not ON_CUDA)
            scored += score_rows(settings, [1, 8, 32] if ON_CUDA else [1, 4], [64, 500, 1024] if ON_CUDA else [64])
        print(table(scored), flush=True)
    print(json.dumps(summary(trained, scored)))


def summary(trained: list[dict[str, Any]], scored: list[dict[str, Any]]) -> dict[str, Any]:
    by_size: dict[str, Any] = {}
    for row in trained:
        by_size.setdefault(f"width{row['width']}_L{row['L']}_{row['lengths'].lower()}", {})[row["arm"]] = row
    training = {}
    for size, arms in by_size.items():
        speed = {arm: row["impressions_per_s"] for arm, row in arms.items()}
        best = max((arm for arm in arms if arm.startswith("ours")), key=lambda arm, speed=speed: speed[arm])
        training[size] = {
            "impressions_per_s": {arm: round(v) for arm, v in speed.items()},
            "mfu": round(arms[best]["mfu"], 3),
        }
        for arm, ratio in (("per impression", "vs_per_impression"), ("shared padded", "vs_shared_padded")):
            if arm in speed:
                training[size][ratio] = round(speed[best] / speed[arm], 2)
    scoring = {
        f"width{row['width']}_L{row['L']}_{row['users']}x{row['candidates']}": round(row["graph_per_s"])
        for row in scored
        if row["candidates"] in (64, 500)
    }
    return {"training": training, "scoring_candidates_per_s": scoring}


if __name__ == "__main__":
    main()
