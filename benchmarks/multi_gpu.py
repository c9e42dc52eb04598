"""Training and serving on the GPUs of one host: python -m benchmarks.multi_gpu [--part step ...] [--out FILE]

On 1, 2, 4 and 8 of them, as many as there are; without GPUs a dry run on two CPU processes with tiny sizes, whose figures mean
nothing. Parts, one after the other, each in a process of its own (`benchmarks.multi_gpu_arms`):

    step         the model step over NCCL at width 512: weak scaling, users divided by tokens and by number, the exchange's share,
                 embedding tables on every device and with their rows spread over them
    resume       Ray Train on all devices, killed with SIGKILL within an epoch, resumed on half of them: were all requests trained
                 once, and is the last loss that of a run that nobody disturbed, which trains beside it. Nothing is compiled,
                 which would take longer than to train; with --compiled it is, one run follows the other, and impressions per
                 second are told
    resume-rows  the same with sharded tables; only when asked for
    serving      one Serve replica a device with affinity: throughput and hit rate

A part's tables are built on the CPUs while the one before it runs, and serving's kernels are compiled if that is no measurement of
speed. Prints Markdown; last, one JSON line. What a part that is cut off has found until then is told.
"""

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import commit
from benchmarks.model_arms.sizes import ON_CUDA
from benchmarks.model_arms.workers import exit_at_sigterm

MODULES = {"step": "steps", "resume": "runs", "resume-rows": "runs", "serving": "replicas"}
OF_STEP = (
    "weak_scaling_efficiency",
    "balancing_gain",
    "balancing_gain_over_fixed_users",
    "all_reduce_share",
    "sharded_vs_replicated",
)


def command(part: str, asked: argparse.Namespace, *others: str) -> list[str]:
    up_to = [str(num) for num in (1, 2, 4, 8) if num <= asked.devices]
    resume = ["--workers", up_to[-1], "--data", asked.data, *(["--compiled"] if asked.compiled else [])]
    of_part = {
        "step": ["--worlds", *up_to, "--seconds", str(asked.seconds - 15)],  # it gives what it has by then
        "resume": resume,
        "resume-rows": [*resume, "--sharding", "rows"],
        "serving": ["--replicas", *up_to, "--data", asked.data],
    }[part]
    return [sys.executable, "-m", f"benchmarks.multi_gpu_arms.{MODULES[part]}", *of_part, *others]


def begun(argv: Sequence[str], stdout: int) -> subprocess.Popen[str]:
    """In a process group of its own, for `end`."""
    return subprocess.Popen(argv, stdout=stdout, text=True, start_new_session=True)


def end(process: subprocess.Popen[str]) -> None:
    """Kills it, if it still runs, and what it has left running; Ray's workers end with their Ray."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def reports(part: str, argv: Sequence[str], most_s: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """A part's page and its JSON each time that it has found more; last, if it failed or took too long, a page that says so."""
    started = time.perf_counter()
    process = begun(argv, subprocess.PIPE)
    assert process.stdout
    cut = threading.Timer(most_s, end, (process,))
    cut.start()
    lines, page, found = list[str](), "", dict[str, Any]()
    try:
        for line in process.stdout:
            if line.startswith("{"):
                page, found, lines = "".join(lines), json.loads(line), []
                yield page, found
            elif "(raylet)" not in line:  # Ray's words when Serve ends
                lines.append(line)
        process.wait()
    finally:
        cut.cancel()
        end(process)
    spent_s = time.perf_counter() - started
    print(f"{part}: {spent_s:.0f} s", file=sys.stderr, flush=True)
    if process.returncode:
        how = "cut off" if spent_s >= most_s else f"failed with exit code {process.returncode}"
        yield f"{page}\n{part}: {how} after {spent_s:.0f} s.\n", found


def prepared_beside(part: str, following: str) -> list[str]:
    """What a part has ready before its turn: its tables, and serving its kernels where nobody's speed is measured meanwhile."""
    return ["--prepare", *(["--compile"] if part != "step" and following == "serving" else [])]


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the parts found under the names of the last line; null where a part was not run."""
    step, resume, serving = (found.get(part, {}) for part in ("step", "resume", "serving"))
    scaling = (
        {key: serving[key] for key in ("throughput", "hit_rate", "serve_rps", "load_generator_rps")}
        if serving
        else None
    )
    return {
        **{key: step.get(key) for key in OF_STEP},
        "resume_exact": resume.get("resume_exact"),
        "resume_loss_difference": resume.get("loss_difference"),
        "resume_rows_exact": found.get("resume-rows", {}).get("resume_exact"),
        "end_to_end_impressions_per_s": resume.get("impressions_per_s"),
        "serving_scaling": scaling,
    }


def write(out: str | None, text: str) -> None:
    """Each time that there is more: whoever ends this run has what was found until then."""
    if out:
        Path(out).write_text(f"{text}\n")


def header(asked: argparse.Namespace) -> str:
    device = f"{asked.devices} x {torch.cuda.get_device_name()}" if ON_CUDA else "no GPU: a dry run"
    command_line = f"python -m benchmarks.multi_gpu {' '.join(sys.argv[1:])}"
    return (
        f"# Several GPUs of one host\n\n`{command_line}` at commit {asked.commit}, one run: "
        f"{device}, {len(os.sched_getaffinity(0))} CPU cores, torch {torch.__version__}, NCCL_NVLS_ENABLE=0.\n"
    )


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    num_devices = torch.cuda.device_count() if ON_CUDA else 2
    parser.add_argument("--part", action="append", choices=list(MODULES), help="default: step, resume and serving")
    parser.add_argument("--devices", type=int, default=num_devices, help="at most so many (default: all)")
    parser.add_argument("--seconds", type=float, default=240 if ON_CUDA else 900, help="most of a part (default 240)")
    parser.add_argument("--compiled", action="store_true", help="resume as fast as it trains, which takes minutes more")
    parser.add_argument("--data", default="runs/benchmark_multi_gpu", help="folder for tables, which stay")
    parser.add_argument("--commit", help="what the code is, where it is not a Git checkout")
    parser.add_argument("--out", help="file that the page is written to as well")
    asked = parser.parse_args(given)
    asked.commit = asked.commit or commit()
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host, whose name may lead nowhere
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault(
        "RAY_AUTH_TOKEN", secrets.token_hex(32)
    )  # the parts' Rays would each write one to the same file
    exit_at_sigterm()  # so that no part is left running
    parts = asked.part or ["step", "resume", "serving"]
    pages, found, preparing = dict[str, str](), dict[str, dict[str, Any]](), dict[str, subprocess.Popen[str]]()

    def text() -> str:
        return "\n".join([header(asked), *pages.values(), json.dumps(summary(found))])

    try:
        for part, following in zip_longest(parts, parts[1:]):
            if ahead := preparing.get(part):
                with suppress(subprocess.TimeoutExpired):  # the part does what is left
                    ahead.wait(asked.seconds)
                end(ahead)
            if following and MODULES[following] != MODULES[part]:  # the same tables
                beside = command(following, asked, *prepared_beside(part, following))
                preparing[following] = begun(beside, subprocess.DEVNULL)
            for page, told in reports(part, command(part, asked), asked.seconds):
                pages[part], found[part] = page, told
                write(asked.out, text())
    finally:
        for process in preparing.values():
            end(process)
        write(asked.out, text())
        print(text(), flush=True)


if __name__ == "__main__":
    main()
