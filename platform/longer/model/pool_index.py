"""The interaction index of user states where it lies in the pool: counted by binary search, grown by merging, slid by renumbering.

What `interactions.InteractionIndex` is for histories, with the same answers. A state keeps, for each field, the sorted pairs
(key, event number) of its window's events, and the events' times.

B states, L events of a state (padded), M new events of all states, n of a state (padded), F fields, C candidates, V query values,
I words of the pool, W of them written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longer.model.fuse import fused_on_cuda
from longer.model.growth import Room
from longer.model.interactions import PAD, features_of_counts, number_of, pair, query_pairs
from longer.model.pool import StatePool


@dataclass(frozen=True)
class PoolIndex:
    """A `CandidateIndex` (`model.interactions`) of states in a pool."""

    pool: StatePool
    event_ts_B: Tensor
    event_words_B: Tensor
    first_B: Tensor
    """Groups before the window."""
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
        merge_size = self.pool.layout.windows.merge_size
        num_steps = ((self.pool.layout.most_groups + 1) * merge_size).bit_length()
        places = self.event_ts_B, self.event_words_B, self.first_B, self.num_events_B
        asked = row_C, begin_C, end_C, request_ts_C, keys_CF
        return _features(self.pool.words_I, *places, *asked, tuple(count_events), merge_size, num_steps, dtype)


@fused_on_cuda
def _features(
    words_I: Tensor,
    event_ts_B: Tensor,
    event_words_B: Tensor,
    first_B: Tensor,
    num_events_B: Tensor,
    row_C: Tensor,
    begin_C: Tensor,
    end_C: Tensor,
    request_ts_C: Tensor,
    keys_CF: Tensor,
    count_events: tuple[int, ...],
    merge_size: int,
    num_steps: int,
    dtype: torch.dtype,
) -> Tensor:
    first_C = first_B[row_C] * merge_size
    end_C, begin_C = end_C - first_C, begin_C - first_C
    field_F = torch.arange(keys_CF.shape[1], device=keys_CF.device)
    begin_CF = event_ts_B[row_C][:, None] + (1 + field_F) * event_words_B[row_C][:, None]
    wanted_CFV = query_pairs(keys_CF, begin_C, end_C, count_events)
    rank_CFV = _rank(words_I, begin_CF, num_events_B[row_C] - first_C, wanted_CFV, num_steps)
    count_CFV = rank_CFV[..., :1] - rank_CFV[..., 1:]
    newest_CF = number_of(words_I[begin_CF + (rank_CFV[..., 0] - 1).clamp_min(0)])
    newest_CF = torch.where(count_CFV[..., 0] > 0, newest_CF, 0)
    newest_ts_CF = words_I[event_ts_B[row_C][:, None] + newest_CF]
    return features_of_counts(keys_CF, count_CFV, newest_CF, newest_ts_CF, end_C, request_ts_C, dtype)


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


class NewEvents(NamedTuple):
    """M events new to B indices, and fillers that do not exist: event m has `number_M[m]` in the window of state `row_M[m]`."""

    keys_MF: Tensor
    event_ts_M: Tensor
    row_M: Tensor
    number_M: Tensor
    exists_M: Tensor


def grow_index(pool: StatePool, at: dict[str, Tensor], room: Room, new: NewEvents) -> None:
    """Writes B indices with their new events in their new places; the old ones' memory may be the same.

    Costs O(L), as a sorted list does: little beside the layers, but for small models on a CPU.
    `at` holds how many events each state `kept`, of which the first `dropped` go, and where they lie.
    """
    words_I, trash_word = pool.words_I, pool.trash_word
    new_BFn = _padded_pairs(new.keys_MF, new, at["kept"] - at["dropped"], room.newest).sort(dim=-1).values
    old_BFL, old_ts_BL = _kept(words_I, at, new_BFn.shape[1], room.kept, trash_word)
    if room.moves:
        old_BFL = _without(old_BFL, at["dropped"])
    # Searched outside of compiled code: Triton fails at a search in rows fused with what it searches for.
    old_places_BFL, new_places_BFn = torch.searchsorted(new_BFn, old_BFL), torch.searchsorted(old_BFL, new_BFn)
    merged = old_BFL, new_BFn, old_places_BFL, new_places_BFn
    target_W, word_W = _written(*merged, old_ts_BL, at, new, room.moves, trash_word)
    words_I[target_W] = word_W


@fused_on_cuda
def _padded_pairs(keys_MF: Tensor, new: NewEvents, stay_B: Tensor, newest: int) -> Tensor:
    """[B, F, n]: the new events' pairs, in no order."""
    num_fields, num_states = keys_MF.shape[1], len(stay_B)
    place_M = new.row_M * newest + new.number_M - stay_B[new.row_M]
    place_M = torch.where(new.exists_M, place_M, num_states * newest)  # the last place is for fillers
    pairs_F1n = keys_MF.new_full((num_fields, num_states * newest + 1), PAD)
    fields_F1 = torch.arange(num_fields, device=keys_MF.device)[:, None]
    pairs_F1n = pairs_F1n.index_put((fields_F1, place_M), pair(keys_MF, new.number_M[:, None]).T)
    return pairs_F1n[:, :-1].unflatten(1, (num_states, newest)).transpose(0, 1).contiguous()


@fused_on_cuda
def _kept(
    words_I: Tensor, at: dict[str, Tensor], num_fields: int, most_kept: int, trash_word: int
) -> tuple[Tensor, Tensor]:
    """[B, F, L] and [B, L]: pairs and times that stand."""
    field_F = 1 + torch.arange(num_fields, device=words_I.device)
    number_L = torch.arange(most_kept, device=words_I.device)
    is_kept_BL = number_L < at["kept"][:, None]
    old_BF = at["old_event_ts"][:, None] + field_F * at["old_event_words"][:, None]
    read_BFL = torch.where(is_kept_BL[:, None], old_BF[..., None] + number_L, trash_word)
    old_BFL = torch.where(is_kept_BL[:, None], words_I[read_BFL], PAD)
    return old_BFL, words_I[torch.where(is_kept_BL, at["old_event_ts"][:, None] + number_L, trash_word)]


@fused_on_cuda
def _written(
    old_BFL: Tensor,
    new_BFn: Tensor,
    old_places_BFL: Tensor,
    new_places_BFn: Tensor,
    old_ts_BL: Tensor,
    at: dict[str, Tensor],
    new: NewEvents,
    moves: bool,
    trash_word: int,
) -> tuple[Tensor, Tensor]:
    """Where to write what: pairs that stand and new ones, each moved up by those of the others before it, and times."""
    field_F = 1 + torch.arange(new_BFn.shape[1], device=new_BFn.device)
    begin_BF1 = (at["event_ts"][:, None] + field_F * at["event_words"][:, None])[..., None]
    targets = [torch.where(new.exists_M, at["event_ts"][new.row_M] + new.number_M, trash_word)]
    words = [new.event_ts_M]
    for pairs, before in ((old_BFL, old_places_BFL), (new_BFn, new_places_BFn)):
        place = torch.arange(pairs.shape[-1], device=pairs.device) + before
        targets.append(torch.where(pairs < PAD, begin_BF1 + place, trash_word).flatten())
        words.append(pairs.flatten())
    if moves:
        number_L = torch.arange(old_ts_BL.shape[1], device=old_ts_BL.device)
        stays_BL = (number_L < at["kept"][:, None]) & (number_L >= at["dropped"][:, None])
        to_BL = at["event_ts"][:, None] + number_L - at["dropped"][:, None]
        targets.append(torch.where(stays_BL, to_BL, trash_word).flatten())
        words.append(old_ts_BL.flatten())
    return torch.cat(targets), torch.cat(words)


def _without(pairs_BFL: Tensor, dropped_B: Tensor) -> Tensor:
    """The pairs without each state's first `dropped_B` events, renumbered, closed up, and padded at the end again."""
    stays_BFL = (pairs_BFL < PAD) & (number_of(pairs_BFL) >= dropped_B[:, None, None])
    longest = pairs_BFL.shape[-1]
    place_BFL = torch.where(stays_BFL, stays_BFL.cumsum(-1) - 1, longest)
    out = torch.full_like(pairs_BFL, PAD)
    padded = torch.cat([out, out[..., :1]], dim=-1)
    return padded.scatter(-1, place_BFL, pairs_BFL - dropped_B[:, None, None])[..., :longest].contiguous()
