"""Training and serving on the GPUs of one host: python -m benchmarks.multi_gpu [--part step ...] [--out FILE]

On 1, 2, 4 and 8 of them, as many as there are; without GPUs a dry run on two CPU processes with tiny sizes, whose figures mean
nothing. Parts, one after the other, each in a process of its own (`benchmarks.multi_gpu_arms`):

    step         the model step over NCCL at width 512: weak scaling, users divided by tokens and by number, the exchange's share,
                 embedding tables on every device and with their rows spread over them
    resume       Ray Train on all devices, killed with SIGKILL within an epoch, resumed on half of them: were all requests trained
                 once; impressions per second of both
    resume-rows  the same with sharded tables; only when asked for
    serving      one Serve replica a device with affinity: throughput and hit rate

Tables are built on the CPUs while the first part runs. Prints Markdown; last, one JSON line.
"""

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.model_arms.sizes import ON_CUDA
from benchmarks.point_reads import commit

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
    of_part = {
        "step": ["--worlds", *up_to, "--seconds", str(asked.seconds - 15)],  # it gives what it has by then
        "resume": ["--workers", up_to[-1], "--data", asked.data],
        "resume-rows": ["--workers", up_to[-1], "--data", asked.data, "--sharding", "rows"],
        "serving": ["--replicas", *up_to, "--data", asked.data],
    }[part]
    return [sys.executable, "-m", f"benchmarks.multi_gpu_arms.{MODULES[part]}", *of_part, *others]


def outcome(part: str, asked: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """A part's page and its JSON; a part that fails or takes too long says so in its page, and the others go on."""
    started = time.perf_counter()
    process = subprocess.Popen(command(part, asked), stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        printed = process.communicate(timeout=asked.seconds)[0].splitlines()
    except subprocess.TimeoutExpired:
        return f"\n{part}: cut off after {asked.seconds:.0f} s.\n", {}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    print(f"{part}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    if process.returncode:
        return f"\n{part}: failed with exit code {process.returncode}.\n", {}
    lines = [line for line in printed if "(raylet)" not in line]  # Ray's words when Serve ends
    return "\n".join(lines[:-1]), json.loads(lines[-1])


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
        "resume_rows_exact": found.get("resume-rows", {}).get("resume_exact"),
        "end_to_end_impressions_per_s": resume.get("impressions_per_s"),
        "serving_scaling": scaling,
    }


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no part is left running
    parts = asked.part or ["step", "resume", "serving"]
    building = {
        module: subprocess.Popen(command(part, asked, "--prepare"), stdout=subprocess.DEVNULL)
        for part, module in MODULES.items()
        if part in parts and module != "steps" and part != parts[0]
    }
    text, found = header(asked), {}
    for part in parts:
        if MODULES[part] in building:
            building[MODULES[part]].wait()
        page, found[part] = outcome(part, asked)
        text += f"{page}\n"
        print(page, flush=True)
        if asked.out:  # after each part: whoever ends this run has what was found until then
            Path(asked.out).write_text(f"{text}\n{json.dumps(summary(found))}\n")
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
