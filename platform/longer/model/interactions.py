"""Candidate x history features: how often and how recently a candidate's item and category occur in the history window.

The paper lists "high-order compressed user-item interaction features" among its tokens (arXiv 2505.04421, section 3.3); softmax
attention normalises, so it cannot count by itself. Counting is done on an index that is appendable and exact: for each history
and field, the sorted pairs (key, event number), 39 bits of key and 23 bits of event number in one int64, padded at the end.

B histories, R requests, C candidates in all requests, E events of all histories, F fields, L events (padded), V query values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longer.arrays import MS_PER_HOUR
from longer.model.fuse import fused_on_cuda
from longer.model.inputs import EventTensors

_INDEX_BITS = 23
_KEY_MASK = 2**39 - 1
PAD = 2**62
TILE_CANDIDATES = 32


class CandidateIndex(Protocol):
    """What candidates are counted with: `InteractionIndex`, or what user states keep of it."""

    def features(
        self,
        row_C: Tensor,
        begin_C: Tensor,
        end_C: Tensor,
        request_ts_C: Tensor,
        keys_CF: Tensor,
        count_events: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor: ...


@dataclass(frozen=True)
class InteractionIndex:
    """Sorted (key, event number) pairs of the events of B histories; event numbers count from `first_index_B`."""

    pairs_BFL: Tensor
    event_ts_BL: Tensor
    first_index_B: Tensor

    @staticmethod
    def build(histories: EventTensors, fields: Sequence[str]) -> "InteractionIndex":
        """The index of every event of the histories."""
        num_events_B = histories.num_events_B
        longest = int(num_events_B.max()) if len(num_events_B) else 0
        row_E = histories.row_E
        slot_E = torch.arange(len(row_E), device=row_E.device) - histories.offsets_B1[row_E]
        keys_EF = torch.stack([histories.features[name] for name in fields], dim=-1)
        pairs_BLF = keys_EF.new_full((len(num_events_B), longest, len(fields)), PAD)
        pairs_BLF[row_E, slot_E] = pair(keys_EF, slot_E[:, None])
        event_ts_BL = keys_EF.new_zeros(len(num_events_B), longest)
        event_ts_BL[row_E, slot_E] = histories.event_ts_E
        return InteractionIndex(pairs_BLF.transpose(1, 2).sort(dim=-1).values, event_ts_BL, histories.first_index_B)

    def features(
        self,
        row_C: Tensor,
        begin_C: Tensor,
        end_C: Tensor,
        request_ts_C: Tensor,
        keys_CF: Tensor,
        count_events: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        """[C, F * (4 + len(count_events))]: log counts in [begin, end) and its last n events, seen, log ages in events and hours.

        `begin_C` and `end_C` are absolute indices inside the rows. A missing key (0) was never seen.
        """
        first_C = self.first_index_B[row_C]
        end_C, begin_C = end_C - first_C, begin_C - first_C
        rank_CFV = self._rank(row_C, query_pairs(keys_CF, begin_C, end_C, count_events))
        count_CFV = rank_CFV[..., :1] - rank_CFV[..., 1:]
        newest_CF = (rank_CFV[..., 0] - 1).clamp_min(0)
        fields = torch.arange(keys_CF.shape[1], device=keys_CF.device)
        if self.pairs_BFL.shape[-1]:
            newest_CF = number_of(self.pairs_BFL[row_C[:, None], fields, newest_CF])
            newest_CF = torch.where(count_CFV[..., 0] > 0, newest_CF, 0)
            newest_ts_CF = self.event_ts_BL[row_C[:, None], newest_CF]
        else:
            newest_ts_CF = torch.zeros_like(newest_CF)
        return features_of_counts(keys_CF, count_CFV, newest_CF, newest_ts_CF, end_C, request_ts_C, dtype)

    def _rank(self, row_C: Tensor, pairs_CFV: Tensor) -> Tensor:
        """How many pairs of the row's field are smaller: batched binary searches, candidates of a row side by side.

        Rows of about as many candidates are searched together: padded to one width, a row of many would cost that for each.
        """
        if row_C.is_cuda:
            return rank_on_cuda(self.pairs_BFL, row_C, pairs_CFV)
        per_row_B = torch.bincount(row_C, minlength=len(self.pairs_BFL))
        slot_C = torch.arange(len(row_C), device=row_C.device) - (per_row_B.cumsum(0) - per_row_B)[row_C]
        width_B = per_row_B.double().log2().ceil().exp2().long()  # at most twice as many as there are
        rank_CFV = torch.empty_like(pairs_CFV)
        for width in width_B[per_row_B > 0].unique().tolist():
            rows = (width_B == width).nonzero()[:, 0]
            some_C = (width_B[row_C] == width).nonzero()[:, 0]
            place = torch.searchsorted(rows, row_C[some_C]), slice(None), slot_C[some_C]
            padded = pairs_CFV.new_zeros(len(rows), pairs_CFV.shape[1], width, pairs_CFV.shape[2])
            padded[place] = pairs_CFV[some_C]
            ranks = torch.searchsorted(self.pairs_BFL[rows].contiguous(), padded.flatten(2))
            rank_CFV[some_C] = ranks.view_as(padded)[place]
        return rank_CFV


@fused_on_cuda
def features_of_counts(
    keys_CF: Tensor,
    count_CFV: Tensor,
    newest_CF: Tensor,
    newest_ts_CF: Tensor,
    end_C: Tensor,
    request_ts_C: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`InteractionIndex.features` from counts, and number and time of the newest event that counts; any where there is none."""
    seen_CF = (count_CFV[..., 0] > 0) & (keys_CF != 0)
    age_events_CF = torch.where(seen_CF, end_C[:, None] - newest_CF, 0)
    age_ms_CF = torch.where(seen_CF, request_ts_C[:, None] - newest_ts_CF, 0)
    counts_CFV = torch.where(seen_CF[..., None], count_CFV, 0).to(dtype).log1p()
    ages_CFV = torch.stack([age_events_CF.to(dtype).log1p(), (age_ms_CF.to(dtype) / MS_PER_HOUR).log1p()], dim=-1)
    return torch.cat([counts_CFV, seen_CF[..., None].to(dtype), ages_CFV], dim=-1).flatten(1)


def count_features(
    events_FE: Tensor,
    event_ts_E: Tensor,
    event_begin_B: Tensor,
    offsets_B1: Tensor,
    tiles: tuple[Tensor, Tensor],
    row_C: Tensor,
    begin_C: Tensor,
    end_C: Tensor,
    request_ts_C: Tensor,
    keys_CF: Tensor,
    count_events: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """`InteractionIndex.features` on CUDA without an index: every event is looked at, which there is faster than a sort.

    History b's events are those from `event_begin_B[b]` on; `begin_C` and `end_C` count from its first. Its candidates are
    `offsets_B1[b]` on, and `tiles` cuts them (`Readers.tiles`) to TILE_CANDIDATES.
    """
    from longer.model.interactions_triton import count_kernel

    start_VC = torch.stack([begin_C, *(torch.maximum(end_C - n, begin_C) for n in count_events)])
    (num_windows, num_candidates), num_fields = start_VC.shape, keys_CF.shape[1]
    count_VCF = keys_CF.new_empty(num_windows, num_candidates, num_fields, dtype=torch.int32)
    newest_CF = keys_CF.new_empty(num_candidates, num_fields, dtype=torch.int32)
    count_kernel[(len(tiles[0]), num_fields, num_windows)](
        events_FE, event_begin_B, keys_CF, start_VC, end_C, count_VCF, newest_CF, *tiles, offsets_B1, events_FE.stride(0),
        num_candidates, F=num_fields, KEY_MASK=_KEY_MASK, BLOCK_M=TILE_CANDIDATES, BLOCK_N=128,
    )  # fmt: skip
    newest_ts_CF = event_ts_E[(event_begin_B[row_C][:, None] + newest_CF).clamp_min(0)]
    return features_of_counts(keys_CF, count_VCF.permute(1, 2, 0), newest_CF, newest_ts_CF, end_C, request_ts_C, dtype)


def rank_on_cuda(pairs_BFL: Tensor, row_C: Tensor, pairs_CFV: Tensor) -> Tensor:
    """How many pairs of the row's field are smaller, without a padded copy of the queries."""
    from longer.model.interactions_triton import rank_kernel

    rank_CFV = torch.zeros_like(pairs_CFV)
    num_pairs, (_, num_fields, num_values) = pairs_BFL.shape[-1], pairs_CFV.shape
    if num_pairs and rank_CFV.numel():
        grid = ((rank_CFV.numel() + 127) // 128,)
        rank_kernel[grid](
            pairs_BFL.contiguous(), row_C, pairs_CFV, rank_CFV, rank_CFV.numel(), num_pairs, num_pairs.bit_length(),
            F=num_fields, V=num_values, BLOCK=128,
        )  # fmt: skip
    return rank_CFV


def num_features(num_fields: int, count_events: Sequence[int]) -> int:
    return num_fields * (4 + len(count_events))


def query_pairs(keys_CF: Tensor, begin_C: Tensor, end_C: Tensor, count_events: Sequence[int]) -> Tensor:
    """[C, F, V]: pairs whose ranks tell how often a key occurs before `end`, before `begin`, and before the last n events."""
    bounds_CV = torch.stack([end_C, begin_C, *(torch.maximum(end_C - n, begin_C) for n in count_events)], dim=-1)
    return pair(keys_CF[..., None], bounds_CV[:, None])


def pair(key: Tensor, event_number: Tensor) -> Tensor:
    return ((key & _KEY_MASK) << _INDEX_BITS) | event_number


def number_of(pairs: Tensor) -> Tensor:
    """Event numbers of pairs."""
    return pairs & (2**_INDEX_BITS - 1)
