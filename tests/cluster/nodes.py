"""Ray nodes as a user starts them, each in processes of its own, with ports, a folder and a token of the test's own.

What the test starts, the test stops; a node is removed by killing all its processes at once, as a spot node goes.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SEEN_DEAD_SOON = {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1000"}
"""Environment of a cluster that takes a lost node for lost within seconds."""

_STARTED_WITHIN_S = 90
_STOPPED_WITHIN_S = 1


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens at on loopback."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Head:
    """A running head node, and the environment in which clients reach it."""

    port: int
    dashboard_port: int
    folder: Path
    environment: dict[str, str] = field(repr=False)
    process: subprocess.Popen = field(repr=False)
    nodes: list[subprocess.Popen] = field(default_factory=list, repr=False)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def run(self, *command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
        """A command in this cluster's environment, at the repository's root."""
        return subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def add_node(self, *flags: str) -> subprocess.Popen:
        """A worker node that has joined; two that start at once on one machine would name their sockets alike."""
        log = self.folder / f"node-{len(self.nodes)}.log"
        node = _start(["--block", f"--address={self.address}", *flags], log, self.environment)
        self.nodes.append(node)
        deadline = time.monotonic() + _STARTED_WITHIN_S
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        return node


def processes_of(node: subprocess.Popen) -> dict[int, str]:
    """Command line by process id of all that a node runs: its session, since Ray's workers may lead groups of their own."""
    commands = {}
    for entry in Path("/proc").iterdir():
        with suppress(ValueError, OSError):
            if os.getsid(int(entry.name)) == node.pid:
                commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return commands


def kill_node(node: subprocess.Popen) -> None:
    """Kills all processes of a node at once."""
    for pid in processes_of(node):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait()


def _start(words: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    command = [str(BIN / "ray"), "start", *words, f"--object-store-memory={100 << 20}"]
    command += [f"--dashboard-agent-listen-port={free_ports(1)[0]}"]
    env = {**environment, "PYTHONPATH": environment.get("NODES_PYTHONPATH", "")}  # jobs bring the package along
    with log.open("w") as out:
        return subprocess.Popen(command, cwd=log.parent, env=env, stdout=out, stderr=out, start_new_session=True)


def _environment(token: str) -> dict[str, str]:
    """This process's, without its own Ray."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{BIN}{os.pathsep}{clean['PATH']}"  # the shell of a submitted job finds the same Python
    ours = {"PATH": path, "PYTHONPATH": str(ROOT / "platform"), "RAY_USAGE_STATS_ENABLED": "0"}
    return {**clean, **ours, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


@contextmanager
def running_head(*flags: str, port: int | None = None, environment: dict[str, str] | None = None) -> Iterator[Head]:
    """A head node with a dashboard on loopback, started by `ray start` and ready for jobs."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets lie under it, whose paths must be short
    own_port, dashboard_port, client_port = free_ports(3)
    env = {**_environment(secrets.token_hex(32)), **(environment or {})}
    words = ["--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port or own_port}", f"--temp-dir={folder}"]
    words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}", "--include-dashboard=true"]
    words += [f"--ray-client-server-port={client_port}", *flags]
    head = Head(port or own_port, dashboard_port, folder, env, _start(words, folder / "head.log", env))
    try:
        _wait_until_ready(head)
        yield head
    finally:
        for node in head.nodes:
            kill_node(node)
        _stop(head.process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(head: Head) -> None:
    """Until the dashboard takes jobs."""
    deadline = time.monotonic() + _STARTED_WITHIN_S
    while head.run(str(BIN / "ray"), "job", "list", "--address", head.url).returncode:
        assert head.process.poll() is None, (head.folder / "head.log").read_text()
        assert time.monotonic() < deadline, "the head did not come up"
        time.sleep(0.5)


def _stop(process: subprocess.Popen) -> None:
    """Ends a `ray start --block` and all that it started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOPPED_WITHIN_S)
    kill_node(process)
