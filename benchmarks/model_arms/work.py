"""Where a step's time on the device goes."""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_KINDS = {
    "matrix products": r"nvjet|cutlass|gemm|gemv|splitK",
    "attention": r"forward_kernel|query_gradient|context_gradient|tail_gradient",
    "counts of candidates": r"count_kernel",
    "large tables": r"_sum_kernel|_update_kernel|radix|DeviceScan",
    "fused elementwise, norms, small tables": r"^triton_",
    "copies and fills": r"Memcpy|Memset|copy|Fill|CatArray",
    "optimizer and norm of gradients": r"multi_tensor|FusedAdam|Norm",
}


def kernel_table(step: Callable[[], Any], num_steps: int = 5) -> str:
    """Markdown: milliseconds a step on the device by kind of kernel, and the ten that take longest."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
    events = [e for e in profiled.key_averages() if e.device_type.name == "CUDA"]
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        kind = next((name for name, pattern in _KINDS.items() if re.search(pattern, event.key)), "other")
        total[kind][0] += event.self_device_time_total / 1e3 / num_steps
        total[kind][1] += event.count / num_steps
    lines = ["| kind of kernel | ms/step | launches |", "|---|---|---|"]
    lines += [f"| {kind} | {ms:.2f} | {n:.0f} |" for kind, (ms, n) in sorted(total.items(), key=lambda x: -x[1][0])]
    lines.append(f"| **all** | **{sum(ms for ms, _ in total.values()):.2f}** | |")
    lines += ["", "| kernel | ms/step | launches |", "|---|---|---|"]
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:25]:
        ms, launches = event.self_device_time_total / 1e3 / num_steps, event.count / num_steps
        lines.append(f"| `{event.key[:70]}` | {ms:.3f} | {launches:.0f} |")
    return "\n".join(lines) + "\n"
