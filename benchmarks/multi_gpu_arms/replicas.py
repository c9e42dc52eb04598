"""Online scoring with 1, 2, 4 and 8 replicas, one a device, with affinity: python -m benchmarks.multi_gpu_arms.replicas

A closed loop of clients in processes of their own asks for every user again and again, after one round that makes their states.
Beside it the limits of what stands before the replicas: Serve alone (a deployment that answers with the same bytes, as many
replicas) and the load generator alone. Prints Markdown and a JSON line, again with each row.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from ray import serve

from benchmarks import serving
from benchmarks.model_arms.sizes import ON_CUDA
from benchmarks.serving_arms.bench import Bench, Service
from benchmarks.serving_arms.servers import ServerArgs
from benchmarks.serving_arms.world import build_world, settings_of
from jobs.serve import free_port
from longer.runner import start_ray

_ON_CUDA = (
    "--device cuda --gpus-per-replica 1 --history-events 2000 --merge-size 8 --event-width 64 --query-groups 100 --self-layers 3 "
    "--users 512 --items 200000 --trace-per-user 2 --candidates 500 --seconds 3 --load-processes 8"
)
_ON_CPU = "--history-events 256 --query-groups 16 --users 40 --trace-per-user 4 --candidates 20 --seconds 2 --load-processes 2"


@dataclass
class Row:
    """What so many replicas answered."""

    num_replicas: int
    num_clients: int
    requests_per_s: float
    scores_per_s: float
    p50_ms: float
    p99_ms: float
    hit_rate: float
    num_failed: int


@dataclass
class Limits:
    """Requests per second of what stands before the replicas, with as many clients as the most of them have."""

    serve_rps: float | None = None
    load_generator_rps: float | None = None


def deployed(bench: Bench, num_replicas: int) -> None:
    """So many replicas are ready, kernels compiled and batches' shapes captured."""
    started = time.perf_counter()
    bench.deploy(scoring=Service(num_replicas, {"state_precision": "bf16" if ON_CUDA else "float32"}))
    ready = f"{num_replicas} replicas ready after {time.perf_counter() - started:.0f} s"
    print(f"serving: {ready}", file=sys.stderr, flush=True)


def measure(bench: Bench, asked: argparse.Namespace, tell: Callable[[list[Row], Limits], None]) -> None:
    """One row for each number of replicas, and the limits with the most; told each time that there is another.

    The most come first: all are ready as soon as one is, and the others need not start any.
    """
    found = list[Row]()
    most, *fewer = sorted(asked.replicas, reverse=True)
    deployed(bench, most)
    answer = bench.answer("scoring")
    for num in (most, *fewer):
        if num < most:
            deployed(bench, num)
        asked.clients = [num * clients for clients in asked.clients_each]
        bench.warm_up("scoring")
        arm = bench.measure(f"{num} replicas", bench.place("scoring"), bench.world.hits, with_open=False)
        best, failed = arm.best, sum(arm.best.failed.values())
        times = best.percentile_ms(50), best.percentile_ms(99)
        speed = best.rps, best.rps * asked.candidates
        found.insert(0, Row(num, arm.num_clients, *speed, *times, best.warm_share, failed))
        tell(found, Limits())
    serve.delete("scoring")
    asked.clients = [most * clients for clients in asked.clients_each]
    limits = Limits(bench.floor(answer, most, with_open=False).rps)
    tell(found, limits)
    echo = ServerArgs(free_port("127.0.0.1", 8433), answer=answer.decode())
    limits.load_generator_rps = bench.alone("load generator", "echo", echo).rps
    tell(found, limits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    num_devices = torch.cuda.device_count() if ON_CUDA else 2
    replicas = [num for num in (1, 2, 4, 8) if num <= num_devices]
    parser.add_argument("--replicas", type=int, nargs="+", default=replicas, help="numbers of replicas (default: all)")
    parser.add_argument("--clients-each", type=int, nargs="+", default=[8, 32], help="clients a replica (default 8 32)")
    parser.add_argument("--data", default="runs/benchmark_multi_gpu", help="folder for tables, which stay")
    parser.add_argument("--prepare", action="store_true", help="build the tables only")
    parser.add_argument(
        "--compile", action="store_true", help="with --prepare: start a replica, for the kernels it leaves"
    )
    ours, others = parser.parse_known_args()  # the others are those of `benchmarks.serving`
    sizes = (_ON_CUDA if ON_CUDA else _ON_CPU).split()
    cpus = ["--logical-cpus", str(2 * max(ours.replicas) + 6), "--data", ours.data]
    asked = argparse.Namespace(**{**vars(serving.options([*sizes, *cpus, *others])), **vars(ours)})
    torch.set_num_threads(1)
    settings = settings_of(asked)
    start_ray(settings.ray)
    world = build_world(settings, asked)
    if asked.prepare and not asked.compile:
        return
    print("serving: tables are built", file=sys.stderr, flush=True)
    bench = Bench(asked, world)
    try:
        if asked.prepare:
            deployed(bench, 1)
        else:
            measure(bench, asked, partial(tell, asked))
    finally:
        serve.shutdown()


def tell(asked: argparse.Namespace, found: list[Row], limits: Limits) -> None:
    print(page(asked, found, limits))
    of_all = {**summary(found, min(asked.replicas)), **asdict(limits), "rows": [asdict(row) for row in found]}
    print(json.dumps(of_all), flush=True)


def page(asked: argparse.Namespace, found: list[Row], limits: Limits) -> str:
    sizes = f"L = {asked.history_events:,}, width {asked.merge_size * asked.event_width}, {asked.candidates} candidates"
    lines = [
        f"\n## One replica a device\n\n{sizes}, {asked.users} users, {asked.load_processes} load processes.\n",
        "| replicas | requests/s | scores/s | clients | p50 / p99 ms | hit rate | failed |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row.num_replicas} | {row.requests_per_s:,.0f} | {row.scores_per_s:,.0f} | {row.num_clients} | "
            f"{row.p50_ms:.1f} / {row.p99_ms:.1f} | {row.hit_rate:.1%} | {row.num_failed} |"
            for row in found
        ),
    ]
    if limits.serve_rps:
        lines.append(
            f"\nServe alone, with {max(asked.replicas)} replicas that do nothing: {limits.serve_rps:,.0f} requests/s."
        )
    if limits.load_generator_rps:
        lines.append(f"The load generator alone: {limits.load_generator_rps:,.0f} requests/s.")
    return "\n".join(lines) + "\n"


def summary(found: list[Row], fewest: int) -> dict[str, dict[str, float]]:
    """By number of replicas: throughput over that of the fewest, once that is known, and the share of requests with a state."""
    of_fewest = [row.requests_per_s for row in found if row.num_replicas == fewest]
    return {
        "throughput": {
            str(row.num_replicas): round(row.requests_per_s / rate, 3) for row in found for rate in of_fewest
        },
        "hit_rate": {str(row.num_replicas): round(row.hit_rate, 4) for row in found},
    }


if __name__ == "__main__":
    main()
