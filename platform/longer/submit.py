"""Runs a job on a cluster as it would run here: its lines on the terminal, its exit code as this one.

    python -m longer.submit [--address http://HOST:8265] -- jobs.train --config configs/quickstart.yaml --root s3://bucket/run

Of the folder it is called in, a checkout of this repository, code and settings travel (.rayignore says which), its platform/longer
as the package, so the cluster runs the code that is here. A token comes from the environment (RAY_AUTH_MODE, RAY_AUTH_TOKEN).

Its own exit codes: 2 for a mistake of yours, 3 if the cluster does not take the job or is lost while it runs, 130 after Ctrl-C.
"""

import argparse
import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import requests
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from longer.errors import UserError, one_line
from longer.progress import say

_ADDRESS = "RAY_API_SERVER_ADDRESS"  # Ray prefers it, and RAY_ADDRESS, to an address that it is given
_LOST_CLUSTER = 3
_INTERRUPTED = 130
_SECONDS_BETWEEN_LOOKS = 1.0
_ANSWERS_WITHIN_S = 20.0
_UPLOADS_WITHIN_S = 600.0
_TAILS_FOR_S = 300.0
"""Seconds after which the log's connection is made anew, since one that is dead says nothing."""
_RECONNECTS_FOR_S = 60.0

_Answer = TypeVar("_Answer")


class LostClusterError(Exception):
    """The cluster, not the user, failed: one line, exit code 3."""


class _Client(JobSubmissionClient):
    """Ray's, which would wait for ever for a cluster that is silent."""

    def _do_request(self, method: str, endpoint: str, **more: Any) -> requests.Response:
        timeout_s = _UPLOADS_WITHIN_S if method == "PUT" else _ANSWERS_WITHIN_S
        return super()._do_request(method, endpoint, **{"timeout": timeout_s, **more})


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at `address`; raises UserError if none answers there, or not to this token."""
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: expected the dashboard's URL, such as http://127.0.0.1:8265")
    os.environ[_ADDRESS] = address
    try:
        return _Client(address)
    except AuthenticationError:
        raise UserError(
            f"--address {address}: the cluster wants its token: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=..."
        ) from None
    except (ConnectionError, requests.Timeout):
        raise UserError(
            f"--address {address}: no Ray cluster answers there: start one, or open its port (`ray dashboard cluster.yaml`)"
        ) from None
    except (requests.RequestException, RuntimeError, KeyError) as error:
        raise UserError(
            f"--address {address}: not a Ray dashboard ({one_line(error)}): expected its URL, such as http://127.0.0.1:8265"
        ) from None


def submit(client: JobSubmissionClient, job: Sequence[str], folder: Path) -> str:
    """Id of a submission of `python -m JOB...` with the folder's code and package.

    Raises UserError for what cannot be sent, LostClusterError if the cluster does not take it.
    """
    package = folder / "platform/longer"
    if not package.is_dir():
        raise UserError(
            f"{folder}: no platform/longer here: submit from the root of the repository, whose code then runs"
        )
    module = folder / f"{job[0].replace('.', '/')}.py"
    if not module.exists():
        raise UserError(f"{job[0]}: no such job in {folder}: name one as jobs.train, from the repository's root")
    environment = {"working_dir": str(folder), "py_modules": [str(package)]}
    try:
        return client.submit_job(entrypoint=shlex.join(["python", "-m", *job]), runtime_env=environment)
    except (requests.RequestException, RuntimeError, AuthenticationError) as error:
        if "status code 413" in str(error):
            raise UserError(
                f"{folder}: more than Ray takes, 100 MB of code and settings: name what need not travel in .rayignore"
            ) from None
        raise LostClusterError(
            f"the cluster did not take the job: {one_line(error)}: see `ray job list` and submit it again"
        ) from None


def follow(client: JobSubmissionClient, submission: str) -> int:
    """The exit code of the job, after its end; its lines are printed as they come, each once, lost connections or not.

    Raises LostClusterError if the cluster gives no answer for a minute.
    """
    num_printed = 0
    while not (info := _asked(client.get_job_info, submission)).status.is_terminal():
        num_printed = asyncio.run(_print_lines(client, submission, num_printed))
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    _print(_asked(client.get_job_logs, submission)[num_printed:])
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.driver_exit_code is None or info.driver_exit_code < 0:  # stopped, killed, or never started
        say("submit", f"{submission} {info.status}: {info.message}")
    return max(info.driver_exit_code or 1, 1)


def _asked(question: Callable[[str], _Answer], submission: str) -> _Answer:
    """The cluster's answer, for which it is asked again and again for a minute."""
    deadline = time.monotonic() + _RECONNECTS_FOR_S
    while True:
        try:
            return question(submission)
        except (requests.RequestException, RuntimeError, AuthenticationError) as error:
            if time.monotonic() > deadline:
                raise LostClusterError(
                    f"lost the cluster: {one_line(error)}; {_goes_on('may go on', submission)}"
                ) from None
        time.sleep(_SECONDS_BETWEEN_LOOKS)


async def _print_lines(client: JobSubmissionClient, submission: str, num_printed: int) -> int:
    """Prints the log from its `num_printed`th character on, until it or the connection ends; how much is then printed."""
    place = 0
    try:
        async with asyncio.timeout(_TAILS_FOR_S):
            async for lines in client.tail_job_logs(submission):
                place += len(lines)
                if place > num_printed:
                    _print(lines[num_printed - place :])
                    num_printed = place
    except (RuntimeError, OSError, ClientError):
        pass  # the connection broke, the job goes on
    return num_printed


def _print(lines: str) -> None:
    print(lines, end="", flush=True)


def run(argv: Sequence[str] | None = None) -> int:
    """Submits, follows, and gives the job's exit code, or 130 after Ctrl-C. Raises UserError and LostClusterError."""
    parser = argparse.ArgumentParser(
        prog="longer.submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--address",
        default=os.environ.get(_ADDRESS, "http://127.0.0.1:8265"),
        help=f"URL of the cluster's dashboard (default: {_ADDRESS}, or port 8265 here)",
    )
    parser.add_argument("job", nargs="+", help="the job and its flags, after --")
    args, more = parser.parse_known_args(argv)
    if more:
        raise UserError(f"unrecognized arguments: {' '.join(more)}: the job comes with its flags after --")
    submission = None
    try:
        client = connect(args.address)
        submission = submit(client, args.job, Path.cwd())
        say("submit", f"{submission} runs {args.job[0]} on {args.address}")
        return follow(client, submission)
    except KeyboardInterrupt:
        unknown = "interrupted before the cluster said that it has the job: `ray job list` tells"
        say("submit", _goes_on("goes on", submission) if submission else unknown)
        return _INTERRUPTED


def _goes_on(how: str, submission: str) -> str:
    return f"the job {how}: see `ray job logs --follow {submission}`, end it with `ray job stop {submission}`"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of a run; a UserError is one line and code 2, a LostClusterError one line and code 3."""
    logging.disable(logging.WARNING)  # Ray tells of uploads and closed connections
    try:
        return run(argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except LostClusterError as error:
        print(error, file=sys.stderr)
        return _LOST_CLUSTER


if __name__ == "__main__":
    sys.exit(main())
