"""The contract's section 5 as it is written: one request at a time, every token in one dense attention, no sharing, no cache.

Written apart from the package: it takes the model's weights and embeddings of single events, and nothing else of its code.
"""

import math

import numpy as np
import torch
from torch import Tensor

from longer.arrays import NO_EVENT_TS, Candidates, Histories
from longer.model.inputs import event_tensors, feature_tensors
from longer.model.longer import Longer


def reference_outputs(
    model: Longer, histories: Histories, request_ts: np.ndarray, candidates: Candidates
) -> np.ndarray:
    """[C, tasks] of requests asked at the end of each whole history (event 0 on)."""
    return reference_tensors(model, histories, request_ts, candidates).detach().numpy()


def reference_tensors(model: Longer, histories: Histories, request_ts: np.ndarray, candidates: Candidates) -> Tensor:
    """The same with its graph."""
    return _all_requests(model, histories, request_ts, candidates)[0]


def reference_vectors(model: Longer, histories: Histories) -> np.ndarray:
    """[B, D]: each user's own global token as the last layer reads it, at the end of each whole history (event 0 on)."""
    features = {name: np.zeros(0, np.int64) for name in ("item_id", "category")} | {"weight": np.zeros(0, np.float32)}
    nothing = Candidates(np.zeros(len(histories) + 1, np.int64), features)
    return _all_requests(model, histories, np.zeros(len(histories), np.int64), nothing)[1].detach().numpy()


def _all_requests(
    model: Longer, histories: Histories, request_ts: np.ndarray, candidates: Candidates
) -> tuple[Tensor, Tensor]:
    answers = []
    for b in range(len(histories)):
        end = int(histories.offsets_B1[b + 1] - histories.offsets_B1[b])
        user = histories.slice_events(np.array([b]), np.array([0]), np.array([end]))
        begin_c, end_c = candidates.offsets_R1[b], candidates.offsets_R1[b + 1]
        own = {name: values[begin_c:end_c] for name, values in candidates.features.items()}
        answers.append(_one_request(model, user, int(request_ts[b]), own))
    outputs, user_tokens = zip(*answers, strict=True)
    return torch.cat(outputs), torch.stack(user_tokens)


def _one_request(
    model: Longer, user: Histories, request_ts: int, candidates: dict[str, np.ndarray]
) -> tuple[Tensor, Tensor]:
    s, K = model.settings.stride_groups, model.settings.merge_size
    W, k = model.settings.history_events // K, model.settings.query_groups
    num_events = len(user.event_ts_E)
    g = math.ceil(num_events / K)
    history_start, query_start = s * (max(0, g - W) // s), s * (max(0, g - k) // s)

    x_Ed = model.embedding.events(event_tensors(user))
    in_paper = model.settings.encoding == "paper"
    if in_paper:
        weights, ts = model.variant, torch.full((num_events,), request_ts)
        distance = weights.request_gap(ts, torch.from_numpy(user.event_ts_E))
        from_newest = torch.arange(num_events).flip(0).clamp_max(model.windows.max_history_events - 1)
        x_Ed = weights.mix(torch.cat([x_Ed, distance], -1)) + weights.place(from_newest)
    groups = []
    for group in range(history_start, g):
        members = x_Ed[group * K : min((group + 1) * K, num_events)]
        if model.embedding.inner is not None:
            members = model.embedding.inner(members[None], None)[0]
        padded = torch.cat([members, members.new_zeros(K - len(members), members.shape[1])])
        groups.append(model.embedding.merge(padded.flatten()))
    offsets = np.array([0, len(candidates["item_id"])])
    x_cand = model.embedding.candidates(feature_tensors(Candidates(offsets, candidates)))
    last_ts = int(user.event_ts_E[-1]) if num_events else int(NO_EVENT_TS)
    x_cand = x_cand + model.embedding.requests(torch.tensor([request_ts]), torch.tensor([last_ts]))
    counts = x_cand.new_zeros(len(x_cand), 0)
    if model.settings.interactions:
        counts = _recount(model, user, history_start * K, request_ts, candidates).to(x_cand.dtype)
        x_cand = x_cand + model.interaction_token(counts)

    user_globals = [*model.embedding.user_globals(torch.from_numpy(user.user_key_B))[0]]
    own_token = len(user_globals) - 1
    if model.settings.queries == "learnable":
        user_globals += [*model.variant.queries_QD]
    num_globals = len(user_globals)
    x = torch.stack([*groups, *user_globals, *x_cand])
    kinds = ["group"] * len(groups) + ["global"] * num_globals + ["candidate"] * len(x_cand)
    positions = torch.tensor([*range(history_start, g), *[g] * (num_globals + len(x_cand))])
    chosen = _chosen(model.settings.queries, history_start, query_start, g, k)
    mask = torch.tensor([[_sees(kinds, q, j) for j in range(len(x))] for q in range(len(x))])
    for number, block in enumerate(model.blocks):
        in_query_window = torch.tensor(
            [kind != "group" or int(p) in chosen for kind, p in zip(kinds, positions, strict=True)]
        )
        if number == len(model.blocks) - 1:
            user_token = x[kinds.count("group") + own_token]
        turned = positions * 0 if in_paper else positions
        query = block.queries(x, turned)
        key, value = block.keys_values(x, turned)
        scores = torch.einsum("qhz,khz->hqk", query, key) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        x = block.finish(x, torch.einsum("hqk,khz->qhz", weights, value).flatten(1))
        if number == 0:  # from here on, only the query window goes on
            x, positions, mask = (
                x[in_query_window],
                positions[in_query_window],
                mask[in_query_window][:, in_query_window],
            )
            kinds = [kind for kind, kept in zip(kinds, in_query_window, strict=True) if kept]
    x = x[-len(x_cand) :] if len(x_cand) else x[:0]
    biases = model.item_bias(torch.from_numpy(candidates["item_id"]))
    return model.head(torch.cat([model.norm_head(x), counts], -1)) + biases, user_token


def _chosen(queries: str, history_start: int, query_start: int, g: int, k: int) -> set[int]:
    """The groups that are queries: where windows stand, k of them, the first of each of k equal bins or the newest."""
    recent_from = {"recent": query_start, "recent_uniform": query_start + k - k // 2}.get(queries, g)
    spread = {"uniform": k, "recent_uniform": k - k // 2}.get(queries, 0)
    over = query_start + spread - history_start if queries != "uniform" else query_start + k - history_start
    bins = {history_start + math.ceil(b * over / spread) for b in range(g * spread + 1)} if spread else set()
    return {group for group in range(history_start, g) if group in bins or group >= recent_from}


def _sees(kinds: list[str], query: int, key: int) -> bool:
    """Groups come first and in order, so an earlier place is an older group."""
    if kinds[key] == "candidate":
        return query == key
    if kinds[query] == "group":
        return kinds[key] == "group" and key <= query
    return True


def _recount(model: Longer, user: Histories, begin: int, request_ts: int, candidates: dict[str, np.ndarray]) -> Tensor:
    """Interaction features by looking at every event of the window for every candidate."""
    rows = []
    for c in range(len(candidates["item_id"])):
        row: list[float] = []
        for field in ("item_id", "category"):
            history, wanted = user.features[field], candidates[field][c]
            places = [i for i in range(begin, len(history)) if history[i] == wanted and wanted != 0]
            row += [math.log1p(len(places))]
            row += [math.log1p(sum(i >= len(history) - n for i in places)) for n in model.settings.count_events]
            row += [float(bool(places))]
            row += [math.log1p(len(history) - places[-1]) if places else 0.0]
            row += [math.log1p((request_ts - user.event_ts_E[places[-1]]) / 3.6e6) if places else 0.0]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 2 * (4 + len(model.settings.count_events)))
