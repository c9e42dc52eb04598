"""States on their way between a device and host memory, and the pools at both ends."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longer.model.pool import StateLayout, StatePool
from longer.slots import Move, Slot


class Copies:
    """Copies between a device and host memory: on CUDA on a stream of their own, elsewhere at once."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after_all_queued(self) -> Iterator[None]:
        """Copies in the block come after all that is queued on the device now; nothing else may be queued in it."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def copy(self, source: StatePool, source_slot: Slot, target: StatePool, target_slot: Slot) -> None:
        """One slot to another of its size."""
        read = source.words_NI[source_slot.start : source_slot.start + source_slot.size]
        write = target.words_NI[target_slot.start : target_slot.start + target_slot.size]
        write.copy_(read, non_blocking=True)

    def wait(self) -> None:
        """What is queued on the device from here on comes after the copies."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def finish(self) -> None:
        """The host waits for the copies."""
        if self.stream is not None:
            self.stream.synchronize()


class DevicePool(StatePool):
    """On the device; compaction moves what may still be copied."""

    def __init__(self, layout: StateLayout, num_bytes: int, device: torch.device, copies: Copies) -> None:
        super().__init__(layout, num_bytes, device)
        self._copies = copies

    def _move(self, moves: list[Move]) -> None:
        self._copies.wait()
        super()._move(moves)


class HostPool(StatePool):
    """In host memory, pinned where a device copies from it; compaction moves what may still be copied.

    States come in whole slots, from slots of their size, so that nothing of another's is left in theirs.
    """

    def __init__(self, layout: StateLayout, num_bytes: int, copies: Copies) -> None:
        super().__init__(layout, num_bytes, pinned=copies.stream is not None)
        self._copies = copies

    def _move(self, moves: list[Move]) -> None:
        self._copies.finish()
        super()._move(moves)
