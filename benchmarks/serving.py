"""What online scoring costs, part by part: python -m benchmarks.serving [--quick] > benchmarks/results/serving_cpu2_DATE.md

One run on one machine, on a generated log, with a model of random weights, over HTTP with the header for affinity:

    load generator      against an answer that is always the same, from a server that does nothing else: its own limit
    floor               a Serve deployment that reads the same bodies and answers with the same bytes
    100% hit            this service, every user's state there
    real trace          the same, the log's last days in their order through a cache that holds half of the users' states
    0% hit              the same without a cache: each request reads and encodes its user's history
    without sequence    100% hit by the same ranker whose history is one group in one layer
    plain server        FastAPI and torch in one process, histories in memory, no cache, no batches

Clients in a closed loop, more and more of them: one client's times, and the most requests a second with p99 at most 50 ms. Then
constant arrival at 70% of that, each request's time counted from when it was due. Arms that are compared run at the same time and
are loaded in turn, window by window, so that they meet the same machine; a ratio is the median of several rounds, and is not given
(null) where one side is never within 50 ms. With 1 and 2 replicas; last, a third joins two warm ones, and the share of users is
counted whose state is still where they are sent.

Prints Markdown; last, one JSON line. On a GPU, about six minutes: --device cuda --history-events 10000 --candidates 500.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence

import numpy as np
import ray
import torch
from ray import serve

from benchmarks.point_reads import commit
from benchmarks.quickstart import cpu_model
from benchmarks.serving_arms.arms import Arm, extra_ms, throughput_ratio, told_ratio
from benchmarks.serving_arms.bench import Bench, Service
from benchmarks.serving_arms.servers import ServerArgs
from benchmarks.serving_arms.world import World, build_world, settings_of
from jobs.serve import free_port
from longer.runner import start_ray


def run(asked: argparse.Namespace, bench: Bench) -> tuple[dict[str, Arm], float]:
    """All arms by a short name, and the share of users found warm after a third replica came.

    Services start together where they can: starting one takes longer than measuring it.
    """
    world, arms = bench.world, dict[str, Arm]()
    without = {"checkpoint": world.checkpoint_without_sequence}
    bench.deploy(hit=Service(1), miss=Service(1, {"cache_bytes": 0}), without=Service(1, without))
    for name in ("hit", "without"):
        warm = bench.load.once(bench.url(name), world.hits)
        if warm.failed:
            raise RuntimeError(f"warming up failed: {dict(warm.failed)}")
    answer, half = bench.answer("hit"), int(len(world.hits) * bench.state_bytes("hit") / 2)
    tables = {name: world.settings.path("tables", name) for name in ("sequences", "items")}
    plain = ServerArgs(
        free_port("127.0.0.1", 8432), world.checkpoint, **tables, device=asked.device, torch_threads=asked.torch_threads
    )
    with bench.floor_running(answer, 1) as floor_url, bench.server_running("plain", plain) as plain_url:
        urls = {
            "100% hit, 1 replica": bench.url("hit"),
            "floor, 1 replica": floor_url,
            "without sequence, 1 replica": bench.url("without"),
            "plain server, 1 process": plain_url,
        }
        together = bench.measure_together(urls, world.hits, asked.rounds)
        arms |= zip(("hit", "floor", "without", "plain"), together, strict=True)
    arms["miss"] = bench.measure("0% hit, 1 replica", bench.url("miss"), world.hits)
    bench.deploy(hit=Service(2), trace=Service(1, {"cache_bytes": half}))
    bench.load.once(bench.url("hit"), world.hits)
    with bench.floor_running(answer, 2) as floor_url:
        urls = {"100% hit, 2 replicas": bench.url("hit"), "floor, 2 replicas": floor_url}
        arms |= zip(("hit2", "floor2"), bench.measure_together(urls, world.hits, 1), strict=True)
    arms["trace"] = bench.measure_trace("real trace, 1 replica", bench.url("trace"), world.trace)
    bench.load.once(bench.url("hit"), world.hits)
    bench.deploy(hit=Service(3))
    time.sleep(1)  # until the proxy has been told
    warm_share = bench.load.once(bench.url("hit"), world.hits).warm_share
    bench.deploy()
    echo = ServerArgs(free_port("127.0.0.1", 8433), answer=answer.decode())
    arms["limit"] = bench.alone("load generator", "echo", echo)
    return arms, warm_share


def page(asked: argparse.Namespace, world: World, arms: dict[str, Arm], warm_share: float) -> str:
    """The results page without its last line."""
    on = torch.cuda.get_device_name() if asked.device == "cuda" else "no GPU"
    versions = f"ray {ray.__version__}, torch {torch.__version__}"
    sizes = (
        f"L = {asked.history_events}, K = {asked.merge_size}, {asked.candidates} candidates, {len(world.hits)} users"
    )
    body = len(world.hits[0][1])
    floor = arms["floor"].samples
    num_clients = max(floor)
    body_ms = [float(np.median(floor[num].body_ms)) for num in (min(floor), num_clients)]
    lines = [
        "# Online scoring, part by part",
        "",
        f"`python -m benchmarks.serving {' '.join(sys.argv[1:])}`, one run.",
        "",
        f"- hardware: {len(os.sched_getaffinity(0))} cores of {cpu_model()}, {on}; load generator on the same machine",
        f"- commit {commit()}; {versions}; {sizes}; bodies of {body / 1000:.1f} kB; {asked.seconds} s a window",
        f"- up to {max(asked.clients)} clients from {asked.load_processes} process(es)",
        "",
        "| | one client, p50 / p99 ms | requests/s, p99 ≤ 50 ms | clients | 70% of it, constant arrival, p50 / p99 ms | states | "
        "failed |",
        "|---|---|---|---|---|---|---|",
        *(arm.row() for arm in arms.values()),
        "",
        told_ratio("requests/s, 100% hit over the floor", arms["hit"], arms["floor"]),
        told_ratio("requests/s, 100% hit over without sequence", arms["hit"], arms["without"]),
        told_ratio("requests/s, 100% hit over the plain server", arms["hit"], arms["plain"]),
        f"- one client's p50, 100% hit above the floor: {extra_ms(arms['hit'], arms['floor']):.2f} ms",
        f"- the floor's wait for the body, which Serve's proxy sends after the head: p50 {body_ms[0]:.2f} ms with one client, "
        f"{body_ms[1]:.2f} ms with {num_clients}",
        f"- a third replica joins two: {warm_share:.0%} of the users are still where their state is",
        "",
    ]
    return "\n".join(lines)


def summary(arms: dict[str, Arm], warm_share: float) -> dict[str, float | None]:
    hit, floor = arms["hit"], arms["floor"]
    assert hit.at_load
    kept = throughput_ratio(hit, arms["without"])
    return {
        "p50_ms": hit.one_client.percentile_ms(50),
        "p99_ms": hit.at_load.percentile_ms(99),
        "floor_p50_ms": floor.one_client.percentile_ms(50),
        "overhead_ms": extra_ms(hit, floor),
        "vs_floor_rps": throughput_ratio(hit, floor),
        "vs_plain_server_rps": throughput_ratio(hit, arms["plain"]),
        "loss_vs_no_sequence": None if kept is None else 1 - kept,
        "warm_share_after_scale_up": warm_share,
    }


def options(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line, or given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few users and short measurements")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (default cpu)")
    parser.add_argument("--gpus-per-replica", type=float, default=0.3, help="share of the GPU; three fit (default 0.3)")
    parser.add_argument("--history-events", type=int, default=2_000, help="L (default 2,000)")
    parser.add_argument("--candidates", type=int, default=100, help="candidates of a request (default 100)")
    parser.add_argument("--merge-size", type=int, default=4, help="K (default 4)")
    parser.add_argument("--query-groups", type=int, default=50, help="k, twice the stride in groups (default 50)")
    parser.add_argument("--event-width", type=int, default=16, help="d; tokens are K*d wide (default 16)")
    parser.add_argument("--self-layers", type=int, default=2, help="N (default 2)")
    parser.add_argument("--users", type=int, help="users of the log (default 400; 200 on a GPU; 60 with --quick)")
    parser.add_argument("--items", type=int, default=10_000, help="items of the log (default 10,000)")
    parser.add_argument(
        "--trace-per-user", type=int, default=20, help="about how many requests of the trace (default 20)"
    )
    parser.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32],
        help="of the closed loops (default 1 2 4 8 16 32)",
    )
    parser.add_argument("--rounds", type=int, help="of the arms that are compared (default 3; 2 with --quick)")
    parser.add_argument("--load-processes", type=int, help="processes that send (default 1; 2 on a GPU)")
    parser.add_argument("--seconds", type=float, help="of one window (default 3; 1.5 on a GPU; 1 with --quick)")
    parser.add_argument("--cache-bytes", type=int, default=4 << 30, help="of a replica at 100%% hit (default 4 GiB)")
    parser.add_argument("--max-batch-requests", type=int, default=16, help="requests scored together (default 16)")
    parser.add_argument("--torch-threads", type=int, default=1, help="threads of one operation (default 1)")
    parser.add_argument("--logical-cpus", type=int, default=8, help="CPUs that Ray counts with (default 8)")
    parser.add_argument("--data", default="runs/benchmark_serving", help="folder for tables, which stay")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args(given)
    on_gpu = asked.device == "cuda"
    asked.users = asked.users or (60 if asked.quick else 200 if on_gpu else 400)
    asked.seconds = asked.seconds or (1.0 if asked.quick else 1.5 if on_gpu else 3.0)
    asked.rounds = asked.rounds or (2 if asked.quick else 3)
    asked.load_processes = asked.load_processes or (2 if on_gpu else 1)
    return asked


def main() -> None:
    asked = options()
    torch.set_num_threads(1)
    settings = settings_of(asked)
    start_ray(settings.ray)
    world = build_world(settings, asked)
    bench = Bench(asked, world)
    try:
        arms, warm_share = run(asked, bench)
    finally:
        serve.shutdown()
    print(page(asked, world, arms, warm_share))
    print(json.dumps(summary(arms, warm_share)))


if __name__ == "__main__":
    main()
