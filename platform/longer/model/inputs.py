"""Requests and histories as tensors: the torch twin of `longer.arrays`.

B histories, E events in all of them, R requests, C candidates in all of them, K events in a group, N full groups in all histories.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longer.arrays import Candidates, Histories, RequestBatch


@dataclass(frozen=True)
class EventTensors:
    """Consecutive events of B users; `features` as in `longer.arrays.Histories`."""

    user_key_B: Tensor
    offsets_B1: Tensor
    first_index_B: Tensor
    prev_event_ts_B: Tensor
    event_ts_E: Tensor
    features: dict[str, Tensor]

    @property
    def num_events_B(self) -> Tensor:
        return self.offsets_B1.diff()

    @property
    def row_E(self) -> Tensor:
        return torch.repeat_interleave(self.num_events_B, output_size=len(self.event_ts_E))

    def previous_ts_E(self) -> Tensor:
        """Time of the event before each event, across the start of the row."""
        num_events = len(self.event_ts_E)
        previous_E1 = F.pad(self.event_ts_E, (1, 0))
        start_B = torch.where(
            self.num_events_B > 0, self.offsets_B1[:-1], num_events
        )  # of none: beyond, where none asks
        return previous_E1.index_copy_(0, start_B, self.prev_event_ts_B)[:num_events]

    def slice_events(self, row_N: Tensor, start_N: Tensor, end_N: Tensor, num_events: int) -> "EventTensors":
        """`Histories.slice_events` where the events lie: of row `row_N[i]`, [start_N[i], end_N[i]), `num_events` in all."""
        lengths_N = end_N - start_N
        offsets_N1 = F.pad(lengths_N.cumsum(0), (1, 0))
        base_N = self.offsets_B1[row_N] - self.first_index_B[row_N] + start_N
        shift_E = torch.repeat_interleave(base_N - offsets_N1[:-1], lengths_N, output_size=num_events)
        event_E = shift_E + torch.arange(num_events, device=shift_E.device)
        return EventTensors(
            user_key_B=self.user_key_B[row_N],
            offsets_B1=offsets_N1,
            first_index_B=start_N,
            prev_event_ts_B=self.last_ts_R(row_N, start_N),
            event_ts_E=self.event_ts_E[event_E],
            features={name: values[event_E] for name, values in self.features.items()},
        )

    def last_ts_R(self, row_R: Tensor, end_R: Tensor) -> Tensor:
        """Time of the event just before absolute index `end_R` of history `row_R`; `NO_EVENT_TS` where there is none."""
        offset_R = end_R - self.first_index_B[row_R]
        inside_R = offset_R > 0
        if not len(self.event_ts_E):
            return self.prev_event_ts_B[row_R]
        position_R = torch.where(inside_R, self.offsets_B1[row_R] + offset_R - 1, 0)
        return torch.where(inside_R, self.event_ts_E[position_R], self.prev_event_ts_B[row_R])


@dataclass(frozen=True)
class RequestTensors:
    """R requests, each of one of B histories, and their candidates; `row_R` is sorted."""

    row_R: Tensor
    history_end_R: Tensor
    request_ts_R: Tensor
    candidate_offsets_R1: Tensor
    candidates: dict[str, Tensor]
    labels: dict[str, Tensor]

    @property
    def num_requests(self) -> int:
        return len(self.row_R)

    @property
    def num_candidates(self) -> int:
        """Known here, so that a device need not be asked."""
        return len(self.candidates["item_id"])

    @property
    def request_of_candidate_C(self) -> Tensor:
        return torch.repeat_interleave(self.candidate_offsets_R1.diff(), output_size=self.num_candidates)


@dataclass(frozen=True)
class BatchTensors(RequestTensors):
    """Requests with the histories that they read; see `longer.arrays.RequestBatch`. `source` is the same on the host."""

    histories: EventTensors
    source: RequestBatch


def to_tensors(batch: RequestBatch, device: torch.device | str = "cpu") -> BatchTensors:
    """The same requests on a device; arrays are not copied where they need not move."""
    histories = batch.histories
    arrays = {
        "row": batch.row_R,
        "history_end": batch.history_end_R,
        "request_ts": batch.request_ts_R,
        "candidate_offsets": batch.candidates.offsets_R1,
        **{f"candidate.{name}": values for name, values in batch.candidates.features.items()},
        **{f"label.{name}": values for name, values in batch.labels.items()},
        **_event_arrays(histories),
    }
    tensors = tensors_of(arrays, device)
    return BatchTensors(
        row_R=tensors["row"],
        history_end_R=tensors["history_end"],
        request_ts_R=tensors["request_ts"],
        candidate_offsets_R1=tensors["candidate_offsets"],
        candidates=under("candidate.", tensors),
        labels=under("label.", tensors),
        histories=_events(tensors),
        source=batch,
    )


def event_tensors(histories: Histories, device: torch.device | str = "cpu") -> EventTensors:
    return _events(tensors_of(_event_arrays(histories), device))


def feature_tensors(candidates: Candidates, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    return tensors_of(candidates.features, device)


def _event_arrays(histories: Histories) -> dict[str, np.ndarray]:
    return {
        "user_key": histories.user_key_B,
        "offsets": histories.offsets_B1,
        "first_index": histories.first_index_B,
        "prev_event_ts": histories.prev_event_ts_B,
        "event_ts": histories.event_ts_E,
        **{f"event.{name}": values for name, values in histories.features.items()},
    }


def _events(tensors: dict[str, Tensor]) -> EventTensors:
    return EventTensors(
        user_key_B=tensors["user_key"],
        offsets_B1=tensors["offsets"],
        first_index_B=tensors["first_index"],
        prev_event_ts_B=tensors["prev_event_ts"],
        event_ts_E=tensors["event_ts"],
        features=under("event.", tensors),
    )


def tensors_of(arrays: dict[str, np.ndarray], device: torch.device | str) -> dict[str, Tensor]:
    """The arrays as tensors: the same memory on a CPU, one copy for each type to any other device."""
    if torch.device(device).type == "cpu":
        return {name: _tensor(array) for name, array in arrays.items()}
    return unpacked({dtype: to_device(buffer, device) for dtype, buffer in packed(arrays).items()}, arrays)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with the prefix, named without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _tensor(array: np.ndarray) -> Tensor:
    if not array.flags.writeable:  # zero-copy views of shared memory; torch warns of writes that never happen
        array = array.copy()
    return torch.from_numpy(np.ascontiguousarray(array))


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The host tensor on a device; to CUDA through pinned memory, so that nobody waits for the work queued there."""
    return tensor if torch.device(device).type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def on(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """The arrays as tensors there, each by a copy of its own."""
    return [to_device(torch.from_numpy(np.ascontiguousarray(array)), device) for array in arrays]


def packed(arrays: dict[str, np.ndarray]) -> dict[np.dtype, Tensor]:
    """The arrays end to end, by type, in pinned memory: a few long copies to CUDA instead of many short ones."""
    by_type: dict[np.dtype, list[np.ndarray]] = {}
    for array in arrays.values():
        by_type.setdefault(array.dtype, []).append(array)
    buffers = {}
    for dtype, those in by_type.items():
        num_values = sum(len(array) for array in those)
        buffers[dtype] = torch.empty(num_values, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
        np.concatenate(those, out=buffers[dtype].numpy())
    return buffers


def unpacked(buffers: dict[np.dtype, Tensor], arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Views of the buffers, shaped and named like the arrays that were packed."""
    views: dict[str, Tensor] = {}
    for dtype, buffer in buffers.items():
        names = [name for name, array in arrays.items() if array.dtype == dtype]
        views |= dict(zip(names, buffer.split([len(arrays[name]) for name in names]), strict=True))
    return views
