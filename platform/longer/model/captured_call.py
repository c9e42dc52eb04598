"""A function of NumPy arrays as one CUDA graph: a call costs one copy to the device and one replay."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, KeysView
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longer.arrays import power_of_two

MAX_GRAPHS = 128
"""Graphs kept, the last used ones: a few for each size of batch would be enough if batches were alike."""

_WARM_UP_CALLS = 2
_STEPS_BETWEEN_POWERS = 4

Arrays = dict[str, npt.NDArray]
S = TypeVar("S", bound=Hashable)


class CapturedCall:
    """`function` of tensors of these names, types and sizes; what it returns is valid until the next call of any graph.

    It is called with `example` before it is captured, and whenever it has to forget: it must do no harm with that, which is
    nobody's. `memory` is shared by graphs that are replayed one after the other (`torch.cuda.graph_pool_handle`).
    """

    def __init__(
        self, function: Callable[[dict[str, Tensor]], Any], example: Arrays, device: torch.device, memory: Any
    ) -> None:
        self._host, self._views = _buffer(example)
        self._device = torch.empty_like(self._host, device=device)
        self._copied = torch.cuda.Event()
        self._example = {name: array.copy() for name, array in example.items() if array.any()}  # the rest is zero
        self._holds_given = False
        tensors = {
            name: self._device[begin:end].view(torch.from_numpy(example[name].reshape(-1)[:0]).dtype)
            for name, (begin, end) in self._views.items()
        }
        self._send(example)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP_CALLS):
                function(tensors)
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._output = function(tensors)

    def __call__(self, arrays: Arrays) -> Any:
        """The function of these arrays; behind a shorter one stands what stood there before."""
        self._send(arrays)
        self._graph.replay()
        self._holds_given = True
        return self._output

    @torch.inference_mode()  # in which the buffers were made
    def forget(self) -> None:
        """Overwrites what it was given since the last time, in host memory and on the device, and what it has made of that."""
        if not self._holds_given:
            return
        self._copied.synchronize()
        self._host.zero_()
        self._send(self._example)
        self._graph.replay()
        self._holds_given = False

    def _send(self, arrays: Arrays) -> None:
        self._copied.synchronize()  # the copy before may still read the buffer
        host = self._host.numpy()
        for name, array in arrays.items():
            begin, _ = self._views[name]
            host[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._device.copy_(self._host, non_blocking=True)
        self._copied.record()


class Graphs(Generic[S]):
    """The graphs of one function, by size, in memory that all of them share: replay one after the other, on one stream."""

    def __init__(self, device: torch.device, memory: Any) -> None:
        self._device, self._memory = device, memory
        self._calls: OrderedDict[S, CapturedCall] = OrderedDict()

    def of(self, size: S, function: Callable[[dict[str, Tensor]], Any], example: Callable[[], Arrays]) -> CapturedCall:
        """The graph of this size; captured, if there is none yet."""
        if size not in self._calls:
            self._calls[size] = CapturedCall(function, example(), self._device, self._memory)
            if len(self._calls) > MAX_GRAPHS:
                _, dropped = self._calls.popitem(last=False)
                dropped.forget()  # its memory is anybody's from now on, and nobody overwrites it then
        self._calls.move_to_end(size)
        return self._calls[size]

    @property
    def sizes(self) -> KeysView[S]:
        """Of which there is a graph."""
        return self._calls.keys()

    def forget(self) -> None:
        """Overwrites what any of them was given, and what it has made of that: one copy and replay each, of those used since."""
        for call in self._calls.values():
            call.forget()


def _buffer(arrays: Arrays) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Pinned bytes for all arrays, each on a word of eight, and where each lies."""
    views, at = {}, 0
    for name, array in arrays.items():
        views[name] = at, at + array.nbytes
        at += -(-array.nbytes // 8) * 8
    return torch.empty(at, dtype=torch.uint8, pin_memory=True), views


def rounded(n: int) -> int:
    """Up to one of a few sizes: from a power of two to the next in four steps, of 64 at least."""
    step = max(64, power_of_two(n) // (2 * _STEPS_BETWEEN_POWERS))
    return max(1, -(-n // step)) * step
