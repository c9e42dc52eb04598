"""Which kernels a hit, an encode and an append launch, and how long each takes: torch's profiler over one step of each."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.state_arms.users import Users

NUM_USERS, NUM_CANDIDATES, NUM_NEW = (1, 32), 500, 8
_MOST_ROWS = 40


def tables(users: Users) -> Iterator[str]:
    """A Markdown table a step, as serving runs it; kernels by their time, the longest first."""
    way = users.served
    for count in NUM_USERS:
        slots, history = users.slots(count), users.events(count, 0, users.num_events)
        asked = users.asked(count, NUM_CANDIDATES)
        states = way.encode(history, slots)
        score = (way.score, states, asked.request_ts_R, asked.candidates)
        yield _table(f"hit, {count} users x {NUM_CANDIDATES} candidates", *score)
        yield _table(f"encode, {count} users", way.encode, history, slots)
        ends = range(users.num_events, users.num_events + 3 * NUM_NEW, NUM_NEW)
        first, second = (users.events(count, begin, begin + NUM_NEW) for begin in ends[:2])
        states = way.append(states, first, slots)  # of this size once before: it is captured now
        yield _table(f"append {NUM_NEW}, {count} users", way.append, states, second, slots, num_warm=0)
        users.free(slots)


def _table(name: str, step: Callable[..., Any], *args: Any, num_warm: int = 2) -> str:
    for _ in range(num_warm):
        step(*args)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step(*args)
        torch.cuda.synchronize()
    times_us = defaultdict[str, list[float]](list)
    kernels = [event for event in seen.events() or () if event.device_type == DeviceType.CUDA]
    for kernel in kernels:
        times_us[kernel.name].append(kernel.time_range.elapsed_us())
    span_us = max(k.time_range.end for k in kernels) - min(k.time_range.start for k in kernels)
    total_us = sum(sum(of_one) for of_one in times_us.values())
    rows = sorted(times_us.items(), key=lambda item: -sum(item[1]))[:_MOST_ROWS]
    head = f"### {name}: {len(kernels)} kernels and copies, {total_us:.0f} us, over {span_us:.0f} us (profiled)"
    lines = [f"| {sum(of_one):.1f} | {len(of_one)} | `{kernel[:90]}` |" for kernel, of_one in rows]
    return "\n".join([head, "", "| us | times | kernel |", "|---|---|---|", *lines, ""])
