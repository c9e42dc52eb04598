"""States on their way between a device and host memory, and the pools at both ends."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longer.model.pool import StatePool
from longer.model.state_layout import StateLayout
from longer.slots import Move, Slot


class Copies:
    """Copies between a device and host memory: on CUDA on streams of their own, one for each way, elsewhere at once.

    Both ways go on beside the device's other work: only what needs a copy, or memory that one uses, waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_async = device.type == "cuda"
        if self.is_async:
            self._inward, self._outward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @contextmanager
    def to_device(self) -> Iterator[None]:
        """Copies in the block come after all that is queued on the device and all copies to the host now; what is queued on the
        device after the block finds them done. Nothing else may be queued in it."""
        if not self.is_async:
            yield
            return
        work = torch.cuda.current_stream()
        self._inward.wait_stream(work)
        self._inward.wait_stream(self._outward)  # what comes may have gone just now, or goes where others lay
        with torch.cuda.stream(self._inward):
            yield
        work.wait_stream(self._inward)

    @contextmanager
    def to_host(self) -> Iterator[None]:
        """Copies in the block come after all that is queued on the device now; nothing else may be queued in it."""
        if not self.is_async:
            yield
            return
        self._outward.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._outward):
            yield

    def copy(self, source: StatePool, source_slot: Slot, target: StatePool, target_slot: Slot) -> None:
        """One slot to another of its size."""
        read = source.words_NI[source_slot.start : source_slot.start + source_slot.size]
        write = target.words_NI[target_slot.start : target_slot.start + target_slot.size]
        write.copy_(read, non_blocking=True)

    def wait(self) -> None:
        """What is queued on the device from here on comes after all copies, and may write where they read."""
        if self.is_async:
            torch.cuda.current_stream().wait_stream(self._outward)

    def finish(self) -> None:
        """The host waits for the copies."""
        if self.is_async:
            self._inward.synchronize()
            self._outward.synchronize()


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
        super().__init__(layout, num_bytes, pinned=copies.is_async)
        self._copies = copies

    def _move(self, moves: list[Move]) -> None:
        self._copies.finish()
        super()._move(moves)
