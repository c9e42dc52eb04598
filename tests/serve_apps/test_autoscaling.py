"""Replicas come for requests and for warm states that would have to go, and do not come and go by turns."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.config import AutoscalingConfig

from longer.autoscaling import ReplicaLoad, ReplicaPolicy, Rule, eviction_age_s, wanted_replicas
from tests.serve_apps.services import END_MS, HOST, Front, running
from tests.serving.tables import build_world

RULE = Rule(warm_s=600, gpu_memory_share=0.9)
SHARES = st.floats(0, 1)
LOADS = st.lists(st.builds(ReplicaLoad, st.floats(0, 1e6), SHARES, st.floats(0, 1e4), SHARES, st.just(0.0)), max_size=8)
REPLICAS = st.integers(1, 50)
REQUESTS = st.floats(0, 1e4)
CALM = ReplicaLoad(num_states=1000, cache_share=1.0, evictions_per_s=0.1, gpu_memory_share=0.5, direct_requests=0)


@given(REPLICAS, REQUESTS, LOADS)
def test_requests_always_have_the_replicas_that_they_need(num: int, requests: float, loads: list[ReplicaLoad]) -> None:
    wanted = wanted_replicas(num, requests, 16, loads, RULE)
    assert wanted >= requests / 16
    assert wanted <= max(requests / 16, num + 1)


@given(REPLICAS, REQUESTS, LOADS, st.floats(1, 100))
def test_more_evictions_and_fuller_memory_never_mean_fewer_replicas(
    num: int, requests: float, loads: list[ReplicaLoad], more: float
) -> None:
    worse = [
        replace(
            load, evictions_per_s=load.evictions_per_s * more, gpu_memory_share=min(load.gpu_memory_share * more, 1)
        )
        for load in loads
    ]
    assert wanted_replicas(num, requests, 16, worse, RULE) >= wanted_replicas(num, requests, 16, loads, RULE)


@given(st.integers(1, 20), st.floats(1, 1e6), st.floats(1e-3, 1e3))
def test_a_replica_that_came_for_warm_states_does_not_go_again_at_once(
    num: int, states: float, evictions_per_s: float
) -> None:
    before = [ReplicaLoad(states, 1.0, evictions_per_s, 0.0, 0.0)] * num
    if wanted_replicas(num, 0, 16, before, RULE) <= num:
        return
    spread = [ReplicaLoad(states, 1.0, evictions_per_s * num / (num + 1), 0.0, 0.0)] * (
        num + 1
    )  # the same users as before
    assert wanted_replicas(num + 1, 0, 16, spread, RULE) >= num + 1


def test_evictions_of_cold_states_and_of_single_large_ones_are_no_reason() -> None:
    assert wanted_replicas(2, 8, 16, [CALM] * 2, RULE) == 0.5
    assert eviction_age_s([CALM] * 2) == pytest.approx(10_000)
    large = replace(CALM, cache_share=0.3, evictions_per_s=100.0)
    assert eviction_age_s([large]) == math.inf
    assert wanted_replicas(2, 8, 16, [large] * 2, RULE) == 0.5
    assert wanted_replicas(2, 8, 16, [], RULE) == 0.5


def test_warm_states_that_go_ask_for_one_more_and_full_memory_lets_none_go() -> None:
    assert wanted_replicas(2, 8, 16, [replace(CALM, evictions_per_s=2.0)] * 2, RULE) == 3
    assert wanted_replicas(2, 8, 16, [replace(CALM, evictions_per_s=1.0)] * 2, RULE) == 2  # one fewer would do that
    assert wanted_replicas(2, 8, 16, [CALM, replace(CALM, gpu_memory_share=0.95)], RULE) == 2
    assert wanted_replicas(2, 8, 16, [CALM, replace(CALM, gpu_memory_share=0.87)], RULE) == 2


def test_a_replica_that_has_told_nothing_yet_is_left_out() -> None:
    told = {name: {"a": value} for name, value in replace(CALM, evictions_per_s=2.0).__dict__.items()}
    told["num_states"]["b"] = 5.0
    context = SimpleNamespace(
        aggregated_metrics=told,
        current_num_replicas=2,
        target_num_replicas=2,
        total_num_requests=8.0,
        config=AutoscalingConfig(max_replicas=4, target_ongoing_requests=16),
    )
    policy = ReplicaPolicy(warm_s=600, gpu_memory_share=0.9)
    assert policy(context) == (3, {})  # type: ignore[arg-type]
    context.aggregated_metrics = None
    assert policy(context) == (0.5, {})  # type: ignore[arg-type]


def test_requests_that_came_straight_to_replicas_count_as_those_that_serve_knows_of() -> None:
    told = {name: {"a": value, "b": value} for name, value in replace(CALM, direct_requests=20).__dict__.items()}
    context = SimpleNamespace(
        aggregated_metrics=told,
        current_num_replicas=2,
        total_num_requests=8.0,
        config=AutoscalingConfig(max_replicas=4, target_ongoing_requests=16),
    )
    assert ReplicaPolicy(warm_s=600, gpu_memory_share=0.9)(context) == (3, {})  # type: ignore[arg-type]


@pytest.mark.ray
def test_states_that_do_not_fit_bring_a_replica_though_there_are_few_requests(front: Front, tmp_path: Path) -> None:
    sizes = {"cache_bytes": 16_000, "max_replicas": 2, "upscale_delay_s": 0, "warm_states_s": 1e6}
    with running(front, build_world(tmp_path), **sizes) as url:
        deadline, asked = time.monotonic() + 60, 0
        while len(httpx.get(f"{url}/v1/status", timeout=30).json()["replicas"]) < 2:
            assert time.monotonic() < deadline, httpx.get(f"{url}/v1/stats").json()
            user, asked = asked % 9 + 1, asked + 1
            body = {"user_id": user, "candidates": ["item1"], "request_ts": END_MS}
            httpx.post(f"{url}/v1/score", json=body, headers={"x-session-id": str(user)}, timeout=30).raise_for_status()
        evicted = httpx.get(f"{url}/v1/status", timeout=30).json()["cache"]["evict"]
    assert evicted > 0


@pytest.mark.ray
def test_load_that_serve_knows_nothing_of_brings_a_replica(front: Front, tmp_path: Path) -> None:
    """Slow: a replica has to come."""
    sizes = {"max_replicas": 2, "upscale_delay_s": 0, "target_ongoing_requests": 2, "direct_host": HOST}
    ended = Event()
    with running(front, build_world(tmp_path), **sizes) as url, ThreadPoolExecutor(8) as pool:
        [straight] = httpx.get(f"{url}/v1/replicas", timeout=30).json()["urls"].values()

        def ask_on(user: int) -> None:
            body = {"user_id": user, "candidates": ["item1"] * 1000, "request_ts": END_MS}
            with httpx.Client(timeout=30) as http:
                while not ended.is_set():
                    http.post(f"{straight}/v1/score", json=body).raise_for_status()

        asking = [pool.submit(ask_on, user) for user in range(1, 9)]
        deadline = time.monotonic() + 60
        try:
            while len(httpx.get(f"{url}/v1/replicas", timeout=30).json()["urls"]) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        finally:
            ended.set()
        for one in asking:
            one.result()
