"""The interaction index of user states where it lies in the pool: counted by binary search, grown by merging, slid by renumbering.

What `interactions.InteractionIndex` is for histories, with the same answers. A state keeps, for each field, the sorted pairs
(key, event number) of its window's events, and the events' times.

B states, L events of a state (padded), M new events of all states, n of a state (padded), F fields, C candidates, V query values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longer.arrays import Int64
from longer.model.fuse import fused_on_cuda
from longer.model.inputs import tensors_of
from longer.model.interactions import PAD, features_of_counts, number_of, pair, query_pairs
from longer.model.pool import Places, StatePool


@dataclass(frozen=True)
class PoolIndex:
    """A `CandidateIndex` (`model.interactions`) of states in a pool."""

    pool: StatePool
    event_ts_B: Tensor
    event_words_B: Tensor
    first_index_B: Tensor
    num_events_B: Tensor

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
        words_I, first_C = self.pool.words_I, self.first_index_B[row_C]
        end_C, begin_C = end_C - first_C, begin_C - first_C
        field_F = torch.arange(keys_CF.shape[1], device=keys_CF.device)
        begin_CF = self.event_ts_B[row_C][:, None] + (1 + field_F) * self.event_words_B[row_C][:, None]
        wanted_CFV = query_pairs(keys_CF, begin_C, end_C, count_events)
        held_C = self.num_events_B[row_C] - first_C
        most_events = (self.pool.layout.most_groups + 1) * self.pool.layout.windows.merge_size
        rank_CFV = _rank(words_I, begin_CF, held_C, wanted_CFV, most_events.bit_length())
        count_CFV = rank_CFV[..., :1] - rank_CFV[..., 1:]
        newest_CF = number_of(words_I[begin_CF + (rank_CFV[..., 0] - 1).clamp_min(0)])
        newest_CF = torch.where(count_CFV[..., 0] > 0, newest_CF, 0)
        newest_ts_CF = words_I[self.event_ts_B[row_C][:, None] + newest_CF]
        return features_of_counts(keys_CF, count_CFV, newest_CF, newest_ts_CF, end_C, request_ts_C, dtype)


@fused_on_cuda
def _rank(words_I: Tensor, begin_CF: Tensor, held_C: Tensor, wanted_CFV: Tensor, num_steps: int) -> Tensor:
    """How many of the `held_C` sorted words from `begin_CF` on are smaller than each wanted one."""
    low_CFV = torch.zeros_like(wanted_CFV)
    high_CFV = low_CFV + held_C[:, None, None]
    for _ in range(num_steps):
        middle_CFV = (low_CFV + high_CFV) // 2
        is_open_CFV = low_CFV < high_CFV
        is_smaller_CFV = words_I[begin_CF[..., None] + middle_CFV] < wanted_CFV
        low_CFV = torch.where(is_open_CFV & is_smaller_CFV, middle_CFV + 1, low_CFV)
        high_CFV = torch.where(is_open_CFV & ~is_smaller_CFV, middle_CFV, high_CFV)
    return low_CFV


@dataclass(frozen=True)
class IndexStep:
    """B indices before and after their next events: `kept_B` events of which the first `dropped_B` go, M new ones.

    New event m belongs to state `row_M[m]`, is its `slot_M[m]`th new one and has `number_M[m]` in its window.
    """

    old: Places
    new: Places
    kept_B: Int64
    dropped_B: Int64
    row_M: Int64
    slot_M: Int64
    number_M: Int64

    def carry_out(self, pool: StatePool, keys_MF: Tensor, event_ts_M: Tensor) -> None:
        """Writes the indices in their new places; the old ones' memory may be the same."""
        arrays = {
            "old": self.old.event_ts_B,
            "old_words": self.old.event_words_B,
            "new": self.new.event_ts_B,
            "new_words": self.new.event_words_B,
            "kept": self.kept_B,
            "dropped": self.dropped_B,
            "row": self.row_M,
            "slot": self.slot_M,
            "number": self.number_M,
        }
        at = tensors_of(arrays, pool.device)
        num_states, num_fields = len(self.kept_B), keys_MF.shape[1]
        field_F = 1 + torch.arange(num_fields, device=pool.device)
        most_new, most_kept = int(self.slot_M.max(initial=-1)) + 1, int(self.kept_B.max(initial=0))
        new_BnF = keys_MF.new_full((num_states, most_new, num_fields), PAD)
        new_BnF[at["row"], at["slot"]] = pair(keys_MF, at["number"][:, None])
        new_BFn = new_BnF.transpose(1, 2).contiguous().sort(dim=-1).values
        begin_BF = at["new"][:, None] + field_F * at["new_words"][:, None]

        number_L = torch.arange(most_kept, device=pool.device)
        is_kept_BL = number_L < at["kept"][:, None]
        old_BF = at["old"][:, None] + field_F * at["old_words"][:, None]
        read_BFL = torch.where(is_kept_BL[:, None], old_BF[..., None] + number_L, pool.trash_word)
        old_BFL = pool.words_I[read_BFL].masked_fill(~is_kept_BL[:, None], PAD)
        old_ts_BL = pool.words_I[torch.where(is_kept_BL, at["old"][:, None] + number_L, pool.trash_word)]
        if self.dropped_B.any():
            old_BFL = _without(old_BFL, at["dropped"])
        for pairs, others in ((old_BFL, new_BFn), (new_BFn, old_BFL)):
            place = torch.arange(pairs.shape[-1], device=pool.device) + torch.searchsorted(others, pairs)
            target = torch.where(pairs < PAD, begin_BF[..., None] + place, pool.trash_word)
            pool.words_I[target] = pairs
        if (self.dropped_B > 0).any() or not np.array_equal(self.old.start_B, self.new.start_B):
            number_BL = number_L - at["dropped"][:, None]
            stays_BL = is_kept_BL & (number_BL >= 0)
            pool.words_I[torch.where(stays_BL, at["new"][:, None] + number_BL, pool.trash_word)] = old_ts_BL
        pool.words_I[at["new"][at["row"]] + at["number"]] = event_ts_M


def _without(pairs_BFL: Tensor, dropped_B: Tensor) -> Tensor:
    """The pairs without each state's first `dropped_B` events, renumbered, closed up, and padded at the end again."""
    stays_BFL = (pairs_BFL < PAD) & (number_of(pairs_BFL) >= dropped_B[:, None, None])
    longest = pairs_BFL.shape[-1]
    place_BFL = torch.where(stays_BFL, stays_BFL.cumsum(-1) - 1, longest)
    out = torch.full_like(pairs_BFL, PAD)
    padded = torch.cat([out, out[..., :1]], dim=-1)
    return padded.scatter(-1, place_BFL, pairs_BFL - dropped_B[:, None, None])[..., :longest].contiguous()
