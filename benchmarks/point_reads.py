"""One user's history out of a million, read from the published table: python -m benchmarks.point_reads [--users N]

Prints a Markdown page: milliseconds a read on the local disk, with footers read before and not, and the requests of one read
over S3 (a server in this process, so requests are counted, not timed); last, one JSON line. Histories are short: what is measured
is finding the user, and a row group of long ones only adds the time to decode it.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.conditions import commit, cpu_model
from jobs import build_sequences, generate_events
from longer.config import load_settings
from longer.data.tables import SequenceTable
from longer.files import read_bytes, write_bytes
from longer.runner import start_ray
from longer.schema import EventSchema
from longer.storage import Table

SCHEMA = EventSchema()
EVENTS_A_USER = 20


def build(root: str, num_users: int) -> Table:
    """The sequence table of a generated log in which every user is about as active, by the platform's own jobs."""
    sizes = {"num_users": num_users, "num_events": EVENTS_A_USER * num_users, "user_zipf_exponent": 0.0}
    settings = load_settings(overrides={"root": root, "generate": sizes})
    start_ray(settings.ray)
    generate_events.run(settings)
    build_sequences.run(settings)
    return Table(settings.path("tables", "sequences"))


def timed(read: Callable[[int], object], users: list[int]) -> tuple[float, float]:
    """p50 and p99 in milliseconds of reading these users one by one."""
    seconds = []
    for user in users:
        started = time.perf_counter()
        read(user)
        seconds.append(time.perf_counter() - started)
    return float(np.percentile(seconds, 50) * 1e3), float(np.percentile(seconds, 99) * 1e3)


def read_one(table: SequenceTable, user: int) -> None:
    if not table.get([user]).offsets_B1[-1]:
        raise AssertionError(f"user {user} came back without a history")


def requests_a_read(local: Table, users: list[int]) -> dict[str, float]:
    """Ranged reads and all requests of one point read over S3, once the footers are there."""
    from moto.server import ThreadedMotoServer

    from tests.s3.proxy import proxy_before

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with proxy_before(f"http://{host}:{port}") as proxy:
        keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update({"AWS_ENDPOINT_URL": proxy.url, **keys})
        import boto3

        boto3.client("s3").create_bucket(Bucket="tables")
        for file in (f for f in Path(local.path).rglob("*") if f.is_file()):
            write_bytes(f"s3://tables/sequences/{file.relative_to(local.path)}", read_bytes(str(file)))
        table = SequenceTable("s3://tables/sequences", SCHEMA)
        table.get(users)
        proxy.requests.clear()
        for user in users:
            read_one(table, user)
        ranged = [request for request in proxy.requests if request.method == "GET" and request.byte_range]
        spans = [request.byte_range.removeprefix("bytes=").split("-") for request in ranged if request.byte_range]
        num_bytes = sum(int(last) - int(first) + 1 for first, last in spans)
    server.stop()
    return {
        "s3_ranged_reads": len(ranged) / len(users),
        "s3_requests": len(proxy.requests) / len(users),
        "s3_bytes": num_bytes / len(users),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000, help="users in the table (default 1,000,000)")
    parser.add_argument("--reads", type=int, default=2_000, help="users read, one by one (default 2,000)")
    args = parser.parse_args()
    users = np.random.default_rng(1).integers(1, args.users + 1, args.reads).tolist()
    with tempfile.TemporaryDirectory() as root:
        print(f"point_reads: writing {args.users} users", file=sys.stderr)
        local = build(root, args.users)
        first_ms, _ = timed(lambda user: read_one(SequenceTable(local.path, SCHEMA), user), users[:20])
        table = SequenceTable(local.path, SCHEMA)
        table.get(users)
        p50_ms, p99_ms = timed(lambda user: read_one(table, user), users)
        s3 = requests_a_read(local, users[:200])
    summary = {
        "users": args.users,
        "buckets": table.num_buckets,
        "p50_ms": round(p50_ms, 3),
        "p99_ms": round(p99_ms, 3),
    }
    summary |= {"first_read_p50_ms": round(first_ms, 1), **s3}
    print("# Point reads: one user of the sequence table\n")
    print(f"- hardware: {len(os.sched_getaffinity(0))} cores of {cpu_model()}, local disk; shared machine")
    print(f"- commit {commit()}; pyarrow {pa.__version__}")
    print(f"- {args.users} users in {table.num_buckets} buckets, {args.reads} reads, one at a time\n")
    print("| | p50 ms | p99 ms |\n|---|---|---|")
    print(f"| local, footers read before | {p50_ms:.2f} | {p99_ms:.2f} |")
    print(f"| local, the first read of a bucket | {first_ms:.1f} | |\n")
    print(
        f"Over S3 a read is {s3['s3_ranged_reads']:g} ranged read of {s3['s3_bytes']:,.0f} bytes, "
        f"{s3['s3_requests']:g} requests in all.\n"
    )
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
