"""Less memory for more time: parts of a pass whose activations are computed again for the gradient."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def run(function: Callable[..., T], *args: Any, recompute: bool, has_randomness: bool = False) -> T:
    """`function(*args)`; with `recompute`, what happens inside is not kept for the gradient but computed once more."""
    if not recompute or not torch.is_grad_enabled():
        return function(*args)
    return cast(T, checkpoint(function, *args, use_reentrant=False, preserve_rng_state=has_randomness))
