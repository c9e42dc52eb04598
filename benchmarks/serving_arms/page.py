"""The results page and its last line, of as much as is measured."""

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.conditions import commit, cpu_model
from benchmarks.serving_arms.arms import Arm, extra_ms, throughput_ratio, told_ratio


@dataclass
class Measured:
    """Arms by short name, seconds by stage, and the share of users found warm after a third replica came."""

    asked: argparse.Namespace
    stages: dict[str, float] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=dict)
    warm_share: float | None = None


def page(measured: Measured) -> str:
    """Without what is not there yet, which is null in the last line."""
    asked, arms = measured.asked, measured.arms
    on = torch.cuda.get_device_name() if asked.device == "cuda" else "no GPU"
    sizes = f"L = {asked.history_events}, K = {asked.merge_size}, {asked.candidates} candidates, {asked.users} users"
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in measured.stages.items())
    lines = [
        "# Online scoring, part by part",
        "",
        f"`python -m benchmarks.serving {' '.join(sys.argv[1:])}`, one run.",
        "",
        f"- hardware: {len(os.sched_getaffinity(0))} cores of {cpu_model()}, {on}; load generator on the same machine",
        f"- commit {commit()}; ray {ray.__version__}, torch {torch.__version__}; {sizes}",
        f"- windows of {asked.seconds} s for each number of clients, twice that at constant arrival; what is compared "
        f"with 100% hit, 1 replica, in {asked.rounds} rounds, all else in one",
        f"- up to {max(asked.clients)} clients from {asked.load_processes} process(es)",
        f"- seconds: {stages}; {sum(measured.stages.values()):.0f} in all",
        "",
        "| | one client, p50 / p99 ms | requests/s, p99 ≤ 50 ms | clients | 70% of it, constant arrival, p50 / p99 ms | states | "
        "failed |",
        "|---|---|---|---|---|---|---|",
        *(arm.row() for arm in arms.values()),
        "",
        *(_compared(arms) if "hit" in arms else ()),
    ]
    if measured.warm_share is not None:
        lines.append(
            f"- a third replica joins two: {measured.warm_share:.0%} of the users are still where their state is"
        )
    return "\n".join([*lines, "", json.dumps(summary(measured)), ""])


def _compared(arms: dict[str, Arm]) -> list[str]:
    hit, floor = arms["hit"], arms["floor"]
    told = [
        told_ratio("requests/s, 100% hit over the floor", hit, floor),
        told_ratio("requests/s, 100% hit over without sequence", hit, arms["without"]),
        told_ratio("requests/s, 100% hit over the plain server", hit, arms["plain"]),
        f"- one client's p50, 100% hit above the floor: {extra_ms(hit, floor):.2f} ms",
    ]
    if "hit_proxied" not in arms:
        return told
    hit, floor = arms["hit_proxied"], arms["floor_proxied"]
    num_clients = min(floor.samples), max(floor.samples)
    body_ms = [float(np.median(floor.samples[num].body_ms)) for num in num_clients]
    return [
        *told,
        told_ratio("requests/s through the proxy, 100% hit over the floor", hit, floor),
        f"- one client's p50 through the proxy, 100% hit above the floor: {extra_ms(hit, floor):.2f} ms",
        f"- the floor's wait for the body, which the proxy sends after the head: p50 {body_ms[0]:.2f} ms with one client, "
        f"{body_ms[1]:.2f} ms with {num_clients[1]}",
    ]


def summary(measured: Measured) -> dict[str, Any]:
    """The last line's figures; None for those that are not there yet."""
    names = (
        "p50_ms",
        "p99_ms",
        "floor_p50_ms",
        "overhead_ms",
        "vs_floor_rps",
        "vs_plain_server_rps",
        "loss_vs_no_sequence",
    )
    figures = dict.fromkeys(names) | _figures(measured.arms) if "hit" in measured.arms else dict.fromkeys(names)
    arms = measured.arms
    proxied = _against(arms["hit_proxied"], arms["floor_proxied"]) if "hit_proxied" in arms else None
    return {**figures, "proxied": proxied, "warm_share_after_scale_up": measured.warm_share}


def _against(hit: Arm, floor: Arm) -> dict[str, float | None]:
    return {
        "p50_ms": hit.one_client.percentile_ms(50),
        "p99_ms": hit.at_load.percentile_ms(99) if hit.at_load else None,
        "floor_p50_ms": floor.one_client.percentile_ms(50),
        "overhead_ms": extra_ms(hit, floor),
        "vs_floor_rps": throughput_ratio(hit, floor),
    }


def _figures(arms: dict[str, Arm]) -> dict[str, float | None]:
    hit = arms["hit"]
    kept = throughput_ratio(hit, arms["without"])
    return {
        **_against(hit, arms["floor"]),
        "vs_plain_server_rps": throughput_ratio(hit, arms["plain"]),
        "loss_vs_no_sequence": None if kept is None else 1 - kept,
    }
