"""Where a step's time on the device goes."""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_KINDS = {
    "matrix products": r"nvjet|cutlass|gemm|gemv|splitK|aten::(add|b|badd)?mm",
    "attention": r"forward_kernel|query_gradient|context_gradient|tail_gradient",
    "attention in groups": r"group_attention",
    "counts of candidates": r"count_kernel",
    "large tables": r"_sum_kernel|_update_kernel|radix|DeviceScan",
    "small tables": r"_small_table",
    "fused elementwise, norms": r"^triton_",
    "copies and fills": r"Memcpy|Memset|copy|Fill|CatArray|aten::(cat|fill_|zero_)",
    "optimizer and norm of gradients": r"multi_tensor|FusedAdam|Norm|_fused_adam|_foreach",
}


def kernel_table(step: Callable[[], Any], num_steps: int = 5) -> str:
    """Markdown: milliseconds a step on the device by kind of kernel (a CPU's: operator), and those that take longest."""
    on_cuda = torch.cuda.is_available()
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiled:
        for _ in range(num_steps):
            step()
        if on_cuda:
            torch.cuda.synchronize()
    rows: list[tuple[str, str, float, float]] = []
    for event in profiled.key_averages():
        if event.device_type.name == ("CUDA" if on_cuda else "CPU"):
            spent_us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            kind = next((name for name, pattern in _KINDS.items() if re.search(pattern, event.key)), "other")
            rows.append((kind, event.key, spent_us / 1e3 / num_steps, event.count / num_steps))
    rows.sort(key=lambda row: -row[2])
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kind, _, ms, launches in rows:
        total[kind][0] += ms
        total[kind][1] += launches
    lines = ["| kind of kernel | ms/step | launches |", "|---|---|---|"]
    lines += [f"| {kind} | {ms:.2f} | {n:.0f} |" for kind, (ms, n) in sorted(total.items(), key=lambda x: -x[1][0])]
    lines.append(f"| **all** | **{sum(ms for ms, _ in total.values()):.2f}** | |")
    for title, shown in {"kernel": rows[:40], "other kernel": [row for row in rows if row[0] == "other"][:20]}.items():
        lines += ["", f"| {title} | ms/step | launches |", "|---|---|---|"]
        lines += [f"| `{key[:110]}` | {ms:.3f} | {launches:.0f} |" for _, key, ms, launches in shown]
    return "\n".join(lines) + "\n"
