"""Forward and backward of the flat pass as two CUDA graphs: a step costs its kernels, not their launches.

C candidates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longer.arrays import RequestBatch
from longer.model.flat import flat_outputs
from longer.model.hashed_table import HeldRows
from longer.model.inputs import packed, to_device, under, unpacked
from longer.model.layout import FlatBatch, Sizes, flatten
from longer.model.longer import Longer

_WARM_UP_STEPS = 3
_NOTHING: Mapping[str, HeldRows] = {}


@dataclass(frozen=True)
class Staged:
    """A batch laid out in `room`, in pinned memory, one buffer a type: ready to be copied to the device in few long copies."""

    room: Sizes
    flat: FlatBatch
    buffers: dict[np.dtype, Tensor]
    num_candidates: int


def stage(batch: RequestBatch, model: Longer, room: Sizes) -> Staged:
    """The batch as a captured pass takes it; for any thread, since it asks the device for nothing."""
    flat = flatten(batch, model.windows, model.embedding.num_globals + 1, room)
    return Staged(room, flat, packed(flat.arrays), int(batch.candidates.offsets_R1[-1]))


def keys_of(flat: FlatBatch) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """Of events, candidates and users, filling included: it reads rows too."""
    return flat.arrays["event.item_id"], flat.arrays["candidate.item_id"], flat.arrays["layout.user_key"]


class CapturedPass:
    """Gradients of a loss in the model's parameters and large tables, replayed for any batch staged in the same room.

    `loss(outputs, labels, exists_C)` must not read the device; where `exists_C` is false stands filling. Each `forward` is followed
    by its `backward`; apart, so that each can be timed. What is random, dropout, is captured with the generator's state, as
    `torch.cuda.CUDAGraph` does. With `is_lent`, the graph reads the large tables' rows where each call puts those of its batch.
    """

    def __init__(
        self,
        model: Longer,
        loss: Callable[[Tensor, dict[str, Tensor], Tensor], Tensor],
        example: Staged,
        autocast: torch.dtype | None = None,
        is_lent: bool = False,
    ) -> None:
        self.model, self.loss, self.autocast, self.room = model, loss, autocast, example.room
        self.device = model.norm_head.weight.device
        self.flat = example.flat
        self.buffers = {dtype: to_device(buffer, self.device) for dtype, buffer in example.buffers.items()}
        self.num_candidates = torch.full((), example.num_candidates, device=self.device)
        self.scale = torch.zeros((), device=self.device)
        self.tensors = unpacked(self.buffers, self.flat.arrays)
        self._held = dict[str, HeldRows]()
        if is_lent:
            keys = model.keys_read(*keys_of(example.flat))
            for name, table in model.large_tables().items():
                table.held = self._held[name] = table.room(len(keys[name]))
        self._tables = [table for table in model.large_tables().values() if table.reads is not None]
        with torch.random.fork_rng(devices=[self.device]):  # what warm-up and capture draw is not the step's
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(_WARM_UP_STEPS):
                    self._backward(self._forward())
            torch.cuda.current_stream().wait_stream(beside)
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()  # of the warm-up: the graph has memory of its own
            self._forward_graph, self._backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            mode = "thread_local"  # another thread stages batches meanwhile
            with torch.cuda.graph(self._forward_graph, capture_error_mode=mode):
                value = self._forward()
            with torch.cuda.graph(self._backward_graph, pool=self._forward_graph.pool(), capture_error_mode=mode):
                self._backward(value)
        self._value = value.detach()
        self.gradients = [parameter.grad for parameter in model.parameters()]
        self.reads = [list(table.reads or ()) for table in self._tables]

    def forward(self, batch: Staged, held: Mapping[str, HeldRows] = _NOTHING) -> Tensor:
        """The loss of the batch, valid until the next call."""
        for dtype, buffer in batch.buffers.items():
            self.buffers[dtype].copy_(buffer, non_blocking=True)
        self.num_candidates.fill_(batch.num_candidates)
        for name, rows in held.items():
            self._held[name].put(rows)
        self._forward_graph.replay()
        return self._value

    def backward(self, scale: Tensor) -> None:
        """Gradients of `scale` times that loss, where training looks: they replace the parameters' and what the tables noted."""
        self.scale.copy_(scale)
        self._backward_graph.replay()
        for parameter, gradient in zip(self.model.parameters(), self.gradients, strict=True):
            parameter.grad = gradient
        for table, reads in zip(self._tables, self.reads, strict=True):
            table.reads[:] = reads  # type: ignore[index]

    def _forward(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        for table in self._tables:
            table.reads.clear()  # type: ignore[union-attr]
        with torch.autocast(
            self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None, cache_enabled=False
        ):
            output_CT = flat_outputs(self.model, self.flat, self.tensors)
        exists_C = torch.arange(len(output_CT), device=self.device) < self.num_candidates
        return self.loss(output_CT, under("label.", self.tensors), exists_C)

    def _backward(self, value: Tensor) -> None:
        (value * self.scale).backward()
