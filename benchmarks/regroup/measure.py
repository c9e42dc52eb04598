"""Runs a contender in a process of its own, on given cores, under a limit, and tells how long it took and what it held.

Memory is what the process and all its descendants hold that cannot be dropped: anonymous memory and shared memory (Ray's
object store is in it), not the page cache. Where the memory controller of cgroup v1 is ours to use, the kernel counts and
holds the limit (page cache counts towards it, but is reclaimed first); elsewhere PSS is summed over the process tree, and a
tree that passes the limit is killed.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.regroup.job import Job

_SAMPLE_S = 0.05
_CONTROLLER = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class Measured:
    """One run. `problem` says why there is no time."""

    seconds: float | None
    startup_seconds: float | None
    peak_bytes: int
    problem: str = ""
    files: list[str] = field(default_factory=list)


def measure(contender: str, job: Job, timeout_s: float) -> Measured:
    """One run of a contender, from a process that starts to one that has ended with all its descendants."""
    os.sync()  # what an earlier contender wrote is not this one's to wait for
    with tempfile.TemporaryFile() as errors, _memory_of(job.memory_bytes) as memory:
        command = [sys.executable, "-m", "benchmarks.regroup.job", contender, json.dumps(asdict(job))]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment(), start_new_session=True,
            preexec_fn=lambda: _enter(memory, job.num_cores),
        )  # fmt: skip
        problem, peak_bytes = _watch(process, memory, timeout_s)
        answer = process.communicate()[0]
        if problem or process.returncode:
            errors.seek(0)
            return Measured(None, None, peak_bytes, problem or memory.problem() or _last_line(errors.read()))
        return Measured(peak_bytes=peak_bytes, **json.loads(answer.splitlines()[-1]))


def limit_in_words() -> str:
    if _own_group() is not None:
        return "a memory cgroup (v1), page cache reclaimed as it fills; the kernel ends what holds more"
    return "a watch on the PSS of the process tree, 20 times a second; it ends what holds more"


class _Group:
    """Memory as the kernel counts it for a cgroup of this contender alone."""

    def __init__(self, path: Path, limit_bytes: int | None) -> None:
        self.path = path
        if limit_bytes:
            (path / "memory.limit_in_bytes").write_text(str(limit_bytes))

    def enter(self) -> None:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def processes(self, root: int) -> list[int]:
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]

    def held_bytes(self, root: int) -> int:
        lines = (self.path / "memory.stat").read_text().splitlines()
        stat = dict(line.split() for line in lines)
        return int(stat["total_rss"]) + int(stat["total_shmem"])

    def over_limit(self, held_bytes: int) -> bool:
        return False  # the kernel's to see

    def problem(self) -> str:
        kills = dict(line.split() for line in (self.path / "memory.oom_control").read_text().splitlines())
        return "out of memory: ended at the limit" if int(kills["oom_kill"]) else ""


class _Tree:
    """Memory as the PSS of a process and its descendants."""

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self.passed = False

    def enter(self) -> None:
        """Nothing to enter: descendants are found by their parents."""

    def processes(self, root: int) -> list[int]:
        children = defaultdict(list)
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it ended meanwhile
                children[int(stat.read_text().rpartition(")")[2].split()[1])].append(int(stat.parent.name))
        found = [root]
        for process in found:
            found += children[process]
        return found

    def held_bytes(self, root: int) -> int:
        return sum(_pss_bytes(process) for process in self.processes(root))

    def over_limit(self, held_bytes: int) -> bool:
        self.passed |= self.limit_bytes is not None and held_bytes > self.limit_bytes
        return self.passed

    def problem(self) -> str:
        return "out of memory: ended at the limit" if self.passed else ""


def _watch(process: subprocess.Popen, memory: _Group | _Tree, timeout_s: float) -> tuple[str, int]:
    """Waits for the end of the process; why it was ended from here, if so, and the most that was held."""
    deadline = time.perf_counter() + timeout_s
    peak_bytes, problem = 0, ""
    while process.poll() is None:
        held_bytes = memory.held_bytes(process.pid)
        peak_bytes = max(peak_bytes, held_bytes)
        if memory.over_limit(held_bytes):
            problem = memory.problem()
        elif time.perf_counter() > deadline:
            problem = f"not done in {timeout_s:.0f} s"
        if problem:
            break
        time.sleep(_SAMPLE_S)
    _end(memory.processes(process.pid))
    return problem, peak_bytes


def _end(processes: list[int]) -> None:
    """Ends what is left of a contender: its own process where it was too slow, and Ray's, which outlive theirs a little."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@contextmanager
def _memory_of(limit_bytes: int | None) -> Iterator[_Group | _Tree]:
    own = _own_group()
    if own is None:
        yield _Tree(limit_bytes)
        return
    path = own / f"longer-benchmark-{secrets.token_hex(4)}"
    path.mkdir()
    try:
        yield _Group(path, limit_bytes)
    finally:
        _remove_group(path)


def _remove_group(path: Path) -> None:
    for _ in range(100):  # the kernel takes a moment to forget processes that were ended
        try:
            return path.rmdir()
        except OSError:
            _end([int(pid) for pid in (path / "cgroup.procs").read_text().split()])
            time.sleep(0.1)
    raise OSError(f"{path}: still in use after ten seconds")


def _own_group() -> Path | None:
    """The memory cgroup that this process is in, if groups may be made under it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        group = _CONTROLLER / path.lstrip("/")
        if controllers == "memory" and (group / "memory.limit_in_bytes").exists() and os.access(group, os.W_OK):
            return group
    return None


def _enter(memory: _Group | _Tree, num_cores: int) -> None:
    memory.enter()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])


def _environment() -> dict[str, str]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    same_priority = {"RAY_worker_niceness": "0"}  # Ray's default, 15, would let anything else on the machine go first
    return {**token, **same_priority, **os.environ}


def _pss_bytes(process: int) -> int:
    with suppress(OSError):  # it ended meanwhile
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


def _last_line(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return (lines or ["ended without a word"])[-1].strip()[:160]
