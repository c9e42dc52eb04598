"""What an encoder is given: histories of similar length, padded, and their candidates in tiles of one history each.

B histories, L events (padded), E events in all histories, R requests, C candidates in all of them, N tiles, A candidates of a tile
(padded), D width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from longer.arrays import Int64
from longer.model.context import take_rows
from longer.model.inputs import BatchTensors, on
from longer.model.padded import LANES, length_classes, pad_ranges
from longer.windows import WindowRule

_TILE_CANDIDATES = 64
_MAX_CELLS = {"cpu": 1 << 26, "cuda": 1 << 28}
"""Numbers in the widest step of what is computed together: what bounds memory. On a GPU little at once is launches and no work."""


@dataclass(frozen=True)
class Bucket:
    """Padded histories `x_BLD`, candidates `x_NAD`; a tile's candidates read history `row_N`, each its own part of it.

    A candidate sees the events in slots [begin, end) of its history: those of its request's window. `end_NA - 1` is thus the
    newest. Padded candidates see what candidate 0 sees and are thrown away; padded events are seen by nobody.
    """

    batch: BatchTensors
    event_BL: Tensor
    x_BLD: Tensor
    row_N: Tensor
    candidate_NA: Tensor
    x_NAD: Tensor
    begin_NA: Tensor
    end_NA: Tensor
    request_ts_NA: Tensor

    @property
    def seen_NAL(self) -> Tensor:
        slot_L = torch.arange(self.x_BLD.shape[1], device=self.row_N.device)
        return (slot_L >= self.begin_NA[..., None]) & (slot_L < self.end_NA[..., None])

    @property
    def age_s_NAL(self) -> Tensor:
        """Seconds from each event to each candidate's request; any where it is not seen."""
        return (self.request_ts_NA[..., None] - self.event_ts_BL.index_select(0, self.row_N)[:, None]) // 1000

    def of_events(self, x_E: Tensor) -> Tensor:
        """[B, L, ...]: what belongs to each event; anything where there is none."""
        if len(x_E):
            return x_E[self.event_BL]
        return x_E.sum() * 0 + x_E.new_zeros(*self.event_BL.shape, *x_E.shape[1:])  # stays in the graph of the weights

    @property
    def event_ts_BL(self) -> Tensor:
        return self.of_events(self.batch.histories.event_ts_E)

    @property
    def x_NLD(self) -> Tensor:
        """Each tile's history."""
        return self.x_BLD.index_select(0, self.row_N)

    def event_feature_BL(self, name: str) -> Tensor:
        return self.of_events(self.batch.histories.features[name])

    def candidate_feature_NA(self, name: str) -> Tensor:
        return self.batch.candidates[name][self.candidate_NA]


def readable(batch: BatchTensors, windows: WindowRule, recent_events: int | None) -> BatchTensors:
    """The batch with histories that begin at the oldest event that any of its candidates reads."""
    source, histories = batch.source, batch.source.histories
    begin_B = histories.end_index_B
    np.minimum.at(begin_B, source.row_R, _begin_R(batch, windows, recent_events))
    if (begin_B == histories.first_index_B).all():
        return batch
    rows, end_B = np.arange(len(histories)), histories.end_index_B
    cut = histories.slice_events(rows, begin_B, end_B)
    row, begin, end = on(batch.row_R.device, rows, begin_B, end_B)
    events = batch.histories.slice_events(row, begin, end, len(cut.event_ts_E))
    return replace(batch, histories=events, source=replace(source, histories=cut))


def _begin_R(batch: BatchTensors, windows: WindowRule, recent_events: int | None) -> Int64:
    """Absolute index of the oldest event that each request reads."""
    end_R = batch.source.history_end_R
    begin_R = windows.history_start(end_R) * windows.merge_size
    return begin_R if recent_events is None else np.maximum(begin_R, end_R - recent_events)


def buckets(
    batch: BatchTensors,
    windows: WindowRule,
    x_ED: Tensor,
    x_CD: Tensor,
    recent_events: int | None,
    cells_per_slot: Callable[[int, int], int],
) -> Iterator[tuple[Bucket, Tensor, Int64]]:
    """Buckets that hold every candidate once: for each, which of its N * A candidates are there, and their numbers.

    Histories that no event is in come in buckets of one padded event that nobody sees. `cells_per_slot` is the encoder's.
    """
    source, device = batch.source, x_CD.device
    first_index_B, offsets_B1 = source.histories.first_index_B, source.histories.offsets_B1
    request_C = np.repeat(np.arange(source.num_requests), np.diff(source.candidates.offsets_R1))
    row_C = source.row_R[request_C]
    begin_C = (_begin_R(batch, windows, recent_events) - first_index_B[source.row_R])[request_C]
    end_C = (source.history_end_R - first_index_B[source.row_R])[request_C]
    ends_B1 = np.searchsorted(row_C, np.arange(len(source.histories) + 1))
    length_B = np.diff(offsets_B1)
    if not len(x_ED):
        x_ED = x_ED.sum() * 0 + x_ED.new_zeros(1, x_ED.shape[1])
    for rows in _parts(length_B, np.diff(ends_B1), cells_per_slot, device):
        event_BL, exists_BL = pad_ranges(offsets_B1[:-1][rows], offsets_B1[1:][rows], multiple=LANES)
        if not event_BL.shape[1]:
            event_BL, exists_BL = np.zeros((len(rows), LANES), np.int64), np.zeros((len(rows), LANES), bool)
        tile_begin = np.concatenate([np.arange(ends_B1[r], ends_B1[r + 1], _TILE_CANDIDATES) for r in rows])
        row_N = np.repeat(np.arange(len(rows)), -(-np.diff(ends_B1)[rows] // _TILE_CANDIDATES))
        if not len(row_N):
            continue
        tile_end = np.minimum(tile_begin + _TILE_CANDIDATES, ends_B1[rows[row_N] + 1])
        candidate_NA, asked_NA = pad_ranges(tile_begin.astype(np.int64), tile_end)
        candidate_NA = np.where(asked_NA, candidate_NA, candidate_NA[:, :1])
        event_BL %= len(x_ED)  # a padded slot is any event: a GPU sums the gradients of one event one by one
        event, row, candidate, asked, begin, end = on(
            device, event_BL, row_N, candidate_NA, np.flatnonzero(asked_NA),
            begin_C[candidate_NA], end_C[candidate_NA],
        )  # fmt: skip
        request_ts = batch.request_ts_R[batch.request_of_candidate_C[candidate]]
        x_BLD = take_rows(x_ED, event) * on(device, exists_BL)[0][..., None]
        bucket = Bucket(batch, event, x_BLD, row, candidate, take_rows(x_CD, candidate), begin, end, request_ts)
        yield bucket, asked, candidate_NA[asked_NA]


def _parts(
    length_B: Int64, num_candidates_B: Int64, cells_per_slot: Callable[[int, int], int], device: torch.device
) -> Iterator[Int64]:
    """Every history once, as many together as memory has room for; on a CPU with others of similar length only.

    On CUDA padding costs less than what starting one more bucket's kernels does.
    """
    on_cpu, most_cells = device.type == "cpu", _MAX_CELLS[device.type]
    for rows in length_classes(length_B, most_cells) if on_cpu else [np.argsort(length_B, kind="stable")]:
        while len(rows):
            longest = max(1, int(length_B[rows[-1]]))
            cells = longest * cells_per_slot(longest, max(1, int(num_candidates_B[rows].max())))
            size = max(1, most_cells // cells)
            yield rows[-size:]
            rows = rows[:-size]
