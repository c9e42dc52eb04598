"""What online scoring costs, part by part: python -m benchmarks.serving [--quick] > benchmarks/results/serving_cpu2_DATE.md

One run on one machine, on a generated log, with a model of random weights, over HTTP with the header for affinity:

    floor               a Serve deployment that reads the same bodies and answers with the same bytes
    through the proxy   the floor, and 100% hit, by Serve's HTTP proxy; all other calls go straight to the replica
    100% hit            this service, every user's state there
    without sequence    100% hit by the same ranker whose history is one group in one layer
    plain server        FastAPI and torch in one process, histories in memory, no cache, no batches
    0% hit              this service without a cache: each request reads and encodes its user's history
    real trace          the log's last requests in their order, through a cache that holds half of the users' states
    load generator      against an answer that is always the same, from a server that does nothing else: its own limit

Clients in a closed loop, more and more of them: one client's times, and the most requests a second with p99 at most 50 ms. Then
constant arrival at 70% of that, each request's time counted from when it was due. Arms that are compared run at the same time and
are loaded in turn, window by window, so that they meet the same machine; a ratio is the median of several rounds, and is not given
(null) where one side is never within 50 ms. With 1 and 2 replicas; last, a third joins two warm ones, and the share of users is
counted whose state is still where they are sent.

Prints Markdown; last, one JSON line. `--out FILE` has the same from the first round on, of what is measured by then: a run that is
cut off keeps it. On a GPU, about five minutes: --device cuda --history-events 10000 --candidates 500.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from ray import serve

from benchmarks.serving_arms.arms import Arm
from benchmarks.serving_arms.bench import Bench, Service, starting
from benchmarks.serving_arms.load import Place
from benchmarks.serving_arms.page import Measured, page
from benchmarks.serving_arms.servers import ServerArgs
from benchmarks.serving_arms.world import build_world, settings_of
from jobs.serve import free_port
from longer.files import write_bytes
from longer.progress import say
from longer.runner import start_ray


def run(bench: Bench, kept: "Kept") -> None:
    """All arms, those that tell most first.

    Services start together where they can, as starting one takes longer than measuring it; never while another is measured.
    The first ones compile their kernels; those that come later find them on the disk.
    """
    asked, world, hits = bench.asked, bench.world, bench.world.hits
    tables = {name: world.settings.path("tables", name) for name in ("sequences", "items")}
    plain = ServerArgs(
        free_port("127.0.0.1", 8432), world.checkpoint, **tables, device=asked.device, torch_threads=asked.torch_threads
    )
    with starting("plain", plain) as server:
        with kept.timed("start of what is compared"):
            bench.deploy(hit=Service(1), without=Service(1, {"checkpoint": world.checkpoint_without_sequence}))
            bench.warm_up("hit", "without")
            answer, half = bench.answer("hit"), int(len(hits) * bench.state_bytes("hit") / 2)
            plain_place = Place(bench.url_of(server))
        with bench.floor_running(answer, 1) as floor, kept.timed("what is compared"):
            places = {
                "floor, 1 replica": floor,
                "100% hit, 1 replica": bench.place("hit"),
                "without sequence, 1 replica": bench.place("without"),
                "plain server, 1 process": plain_place,
            }
            for arms in bench.measured_together(places, hits, asked.rounds):
                kept.note(**dict(zip(("floor", "hit", "without", "plain"), arms, strict=True)))
            places = {
                "floor, 1 replica, through the proxy": Place(floor.url),
                "100% hit, 1 replica, through the proxy": Place(bench.url("hit")),
            }
            for arms in bench.measured_together(places, hits, 1):
                kept.note(**dict(zip(("floor_proxied", "hit_proxied"), arms, strict=True)))
    with kept.timed("start of the others"):
        bench.deploy(hit=Service(2), miss=Service(1, {"cache_bytes": 0}), trace=Service(1, {"cache_bytes": half}))
    with kept.timed("0% hit"):
        kept.note(miss=bench.measure("0% hit, 1 replica", bench.place("miss"), hits))
    with kept.timed("real trace"):
        kept.note(trace=bench.measure_trace("real trace, 1 replica", bench.place("trace"), world.trace))
    with kept.timed("2 replicas"):
        bench.warm_up("hit")
        with bench.floor_running(answer, 2) as floor:
            places = {"floor, 2 replicas": floor, "100% hit, 2 replicas": bench.place("hit")}
            for arms in bench.measured_together(places, hits, 1):
                kept.note(**dict(zip(("floor2", "hit2"), arms, strict=True)))
    with kept.timed("a third replica"):
        bench.warm_up("hit")
        bench.deploy(hit=Service(3))
        kept.measured.warm_share = bench.load.once(bench.place("hit"), hits).warm_share
    with kept.timed("load generator"):
        bench.deploy()
        echo = ServerArgs(free_port("127.0.0.1", 8433), answer=answer.decode())
        kept.note(limit=bench.alone("load generator", "echo", echo))


@dataclass
class Kept:
    """What is measured so far, told as it comes; its page is in `file` whatever happens afterwards."""

    file: str | None
    measured: Measured

    def note(self, **arms: Arm) -> None:
        """By short name; in the place of what an earlier round gave."""
        self.measured.arms |= arms
        self._keep()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.measured.stages[stage] = seconds = time.perf_counter() - started
        say("serving", f"{stage}: {seconds:.1f} s")
        self._keep()

    def _keep(self) -> None:
        if self.file:
            write_bytes(os.path.abspath(self.file), page(self.measured).encode())


def options(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line, or given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few users and short measurements")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (default cpu)")
    parser.add_argument("--gpus-per-replica", type=float, default=0.2, help="share of the GPU; five fit (default 0.2)")
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
    parser.add_argument("--seconds", type=float, help="of one window (default 3; 1 on a GPU or with --quick)")
    parser.add_argument("--cache-bytes", type=int, default=4 << 30, help="of a replica at 100%% hit (default 4 GiB)")
    parser.add_argument("--max-batch-requests", type=int, default=16, help="requests scored together (default 16)")
    parser.add_argument("--torch-threads", type=int, default=1, help="threads of one operation (default 1)")
    parser.add_argument("--logical-cpus", type=int, default=8, help="CPUs that Ray counts with (default 8)")
    parser.add_argument("--data", default="runs/benchmark_serving", help="folder for tables, which stay")
    parser.add_argument("--out", help="file that has the page of what is measured so far")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args(given)
    on_gpu = asked.device == "cuda"
    asked.users = asked.users or (60 if asked.quick else 200 if on_gpu else 400)
    asked.seconds = asked.seconds or (1.0 if asked.quick or on_gpu else 3.0)
    asked.rounds = asked.rounds or (2 if asked.quick else 3)
    asked.load_processes = asked.load_processes or (2 if on_gpu else 1)
    return asked


def main() -> None:
    asked = options()
    torch.set_num_threads(1)
    settings, kept = settings_of(asked), Kept(asked.out, Measured(asked))
    with kept.timed("start of Ray"):
        start_ray(settings.ray)
    signal.signal(signal.SIGTERM, _end)  # Ray's own would print stacks, and leave the plain server running
    with kept.timed("tables"):
        world = build_world(settings, asked)
    run(Bench(asked, world), kept)
    print(page(kept.measured), end="")
    serve.shutdown()


def _end(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
