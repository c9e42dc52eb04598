"""The study in several processes of one machine, which share its work."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

_CONTROL = "nvidia-cuda-mps-control"


def run_in_processes(arguments: list[str], num_a_device: int, device: str, side_by_side: bool) -> None:
    """Runs `python -m benchmarks.quality` with these arguments, so many times on each GPU, or on the CPU; waits for all.

    `side_by_side`: kernels of one GPU's processes run at once, through NVIDIA's multi-process service, instead of in turns.
    Raises SystemExit if one fails; the others are waited for, and end what they have begun.
    """
    devices = _devices(side_by_side) if device == "cuda" else [None]
    command = [sys.executable, "-m", "benchmarks.quality", *arguments]
    with _multi_process_service() if side_by_side else nullcontext({}) as environment:
        running = [
            subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment, **_only(name)})
            for _ in range(num_a_device)
            for name in devices
        ]
        codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"{sum(map(bool, codes))} of {len(codes)} processes failed: see above")


def _devices(side_by_side: bool) -> list[str]:
    """The visible GPUs, as new processes name them; the service numbers those that it sees anew."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and not side_by_side:
        return visible.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]


def _only(name: str | None) -> dict[str, str]:
    return {} if name is None else {"CUDA_VISIBLE_DEVICES": name}


@contextmanager
def _multi_process_service() -> Iterator[dict[str, str]]:
    """A service of our own, beside any that the machine runs, and the environment in which processes find it."""
    if not shutil.which(_CONTROL):
        raise SystemExit(f"--mps: {_CONTROL} is not on the PATH: install it with the driver, or leave --mps out")
    with tempfile.TemporaryDirectory(prefix="longer-mps-") as folder:
        found = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        environment = {**os.environ, **found}
        subprocess.run([_CONTROL, "-d"], env=environment, check=True)
        try:
            yield found
        finally:
            subprocess.run([_CONTROL], input=b"quit\n", env=environment, check=True)
