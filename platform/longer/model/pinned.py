"""Pinned host memory of exactly the size asked for. torch rounds its own up to a power of two: to twice the budget at worst."""

import mmap
import weakref

import torch
from torch import Tensor


def pinned_words(num_words: int) -> Tensor:
    """Words in memory of their own, zero, pinned; unpinned and given back with their storage."""
    memory = mmap.mmap(-1, max(1, num_words) * 8)
    words = torch.frombuffer(memory, dtype=torch.int64, count=num_words)
    cuda = torch.cuda.cudart()
    torch.cuda.check_error(cuda.cudaHostRegister(words.data_ptr(), len(memory), 0))
    weakref.finalize(
        words.untyped_storage(), _unpin, words.data_ptr(), memory
    ).atexit = False  # the process's end does it
    return words


def _unpin(address: int, memory: mmap.mmap) -> None:
    """Holds the memory until no copy from or to it is under way: what is still pinned must not be unmapped."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)
