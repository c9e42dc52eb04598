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
    outputs = []
    for b in range(len(histories)):
        end = int(histories.offsets_B1[b + 1] - histories.offsets_B1[b])
        user = histories.slice_events(np.array([b]), np.array([0]), np.array([end]))
        begin_c, end_c = candidates.offsets_R1[b], candidates.offsets_R1[b + 1]
        own = {name: values[begin_c:end_c] for name, values in candidates.features.items()}
        outputs.append(_one_request(model, user, int(request_ts[b]), own))
    return torch.cat(outputs).detach().numpy()


def _one_request(model: Longer, user: Histories, request_ts: int, candidates: dict[str, np.ndarray]) -> Tensor:
    s, K = model.settings.stride_groups, model.settings.merge_size
    W, k = model.settings.history_events // K, model.settings.query_groups
    num_events = len(user.event_ts_E)
    g = math.ceil(num_events / K)
    history_start, query_start = s * (max(0, g - W) // s), s * (max(0, g - k) // s)

    x_Ed = model.embedding.events(event_tensors(user))
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
    counts = _recount(model, user, history_start * K, request_ts, candidates).to(x_cand.dtype)
    x_cand = x_cand + model.interaction_token(counts)

    num_globals = model.settings.num_cls_tokens + 1
    x = torch.stack([*groups, *model.embedding.user_globals(torch.from_numpy(user.user_key_B))[0], *x_cand])
    kinds = ["group"] * len(groups) + ["global"] * num_globals + ["candidate"] * len(x_cand)
    positions = torch.tensor([*range(history_start, g), *[g] * (num_globals + len(x_cand))])
    mask = torch.tensor([[_sees(kinds, q, j) for j in range(len(x))] for q in range(len(x))])
    for number, block in enumerate(model.blocks):
        in_query_window = torch.tensor(
            [kind != "group" or p >= query_start for kind, p in zip(kinds, positions, strict=True)]
        )
        query = block.queries(x, positions)
        key, value = block.keys_values(x, positions)
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
    return model.head(torch.cat([model.norm_head(x), counts], -1)) + biases


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
