"""Forward and backward of the flat pass as one CUDA graph: a step costs its kernels, not their launches.

C candidates.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from longer.arrays import RequestBatch
from longer.model.flat import flat_outputs
from longer.model.inputs import packed, to_device, under, unpacked
from longer.model.layout import Sizes, flatten
from longer.model.longer import Longer

_WARM_UP_STEPS = 3


class CapturedPass:
    """Gradients of a loss in the model's parameters, replayed for any batch that fits into `room`.

    `loss(outputs, labels, exists_C)` must not read the device; where `exists_C` is false stands filling. Each call replaces the
    parameters' `.grad`. What is random, dropout, is captured with the generator's state, as `torch.cuda.CUDAGraph` does.
    """

    def __init__(
        self,
        model: Longer,
        loss: Callable[[Tensor, dict[str, Tensor], Tensor], Tensor],
        room: Sizes,
        example: RequestBatch,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.loss, self.room, self.autocast = model, loss, room, autocast
        self.device = model.norm_head.weight.device
        self.flat = flatten(example, model.windows, model.embedding.num_globals + 1, room)
        self.buffers = {dtype: to_device(buffer, self.device) for dtype, buffer in packed(self.flat.arrays).items()}
        self.num_candidates = torch.zeros((), dtype=torch.int64, device=self.device)
        self.num_candidates.fill_(int(example.candidates.offsets_R1[-1]))
        self.tensors = unpacked(self.buffers, self.flat.arrays)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP_STEPS):
                self._run()
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        model.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph):
            self.value = self._run()
        self.gradients = [parameter.grad for parameter in model.parameters()]

    def __call__(self, batch: RequestBatch) -> Tensor:
        """The loss of the batch, valid until the next call; its gradients are in the parameters."""
        arrays = flatten(batch, self.model.windows, self.model.embedding.num_globals + 1, self.room).arrays
        for dtype, buffer in packed(arrays).items():
            self.buffers[np.dtype(dtype)].copy_(buffer.pin_memory(), non_blocking=True)
        self.num_candidates.fill_(int(batch.candidates.offsets_R1[-1]))
        self.graph.replay()
        for parameter, gradient in zip(self.model.parameters(), self.gradients, strict=True):
            parameter.grad = gradient
        return self.value

    def _run(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(
            self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None, cache_enabled=False
        ):
            output_CT = flat_outputs(self.model, self.flat, self.tensors)
        labels = under("label.", self.tensors)
        exists_C = torch.arange(len(output_CT), device=self.device) < self.num_candidates
        value = self.loss(output_CT, labels, exists_C)
        value.backward()
        return value.detach()
