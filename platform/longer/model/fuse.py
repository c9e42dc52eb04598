"""What is done otherwise on CUDA: elementwise work compiled into few kernels, attention and counting in kernels of our own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental import _config as shapes

_IS_PLAIN = ContextVar("is_plain", default=False)

F = TypeVar("F", bound=Callable[..., Any])


def has_kernels(x: Tensor) -> bool:
    """Whether our kernels serve tensors like this one; float64 is computed as on a CPU, for tests."""
    return x.is_cuda and x.dtype != torch.float64


def computed_in(weight: Tensor) -> torch.dtype:
    """The type of what a product with this weight gives: autocast's, where it is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, nothing is compiled: for what is computed too seldom to be worth it."""
    token = _IS_PLAIN.set(True)
    try:
        yield
    finally:
        _IS_PLAIN.reset(token)


def fused_on_cuda(function: F) -> F:
    """The same function, compiled by `torch.compile` for any sizes where our kernels serve its first tensor argument.

    A CPU gains nothing that is worth the time to compile. Within another compiled function it is a part of that one.
    """
    compiled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not has_kernels(next(x for x in args if isinstance(x, Tensor))):
            return function(*args)
        if _IS_PLAIN.get():
            return function(*args)
        if not compiled:
            shapes.use_duck_shape = False  # or sizes that agree by chance in one call must do so ever after
            compiled.append(torch.compile(function, dynamic=True))
        return compiled[0](*args)

    return call  # type: ignore[return-value]
