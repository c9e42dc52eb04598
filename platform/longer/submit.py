"""Runs a job on a cluster as it would run here: its lines on the terminal, its exit code as this one.

    python -m longer.submit [--address http://HOST:8265] -- jobs.train --config configs/quickstart.yaml --root s3://bucket/run

The folder it is called in travels as the job's working folder, without what .gitignore and .rayignore name, and this package with
it, so the cluster runs the code that is here. A token comes from the environment (RAY_AUTH_MODE, RAY_AUTH_TOKEN).
"""

import argparse
import asyncio
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import requests
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

import longer
from longer.errors import UserError, one_line
from longer.progress import say

_ADDRESS = "RAY_API_SERVER_ADDRESS"  # Ray prefers it, and RAY_ADDRESS, to an address that it is given
_INTERRUPTED = 130
_SECONDS_BETWEEN_LOOKS = 1.0


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at `address`; raises UserError if none answers there, or not to this token."""
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: expected the dashboard's URL, such as http://127.0.0.1:8265")
    os.environ[_ADDRESS] = address
    try:
        return JobSubmissionClient(address)
    except ConnectionError:
        raise UserError(
            f"--address {address}: no Ray cluster answers there: start one, or open its port (`ray dashboard cluster.yaml`)"
        ) from None
    except AuthenticationError:
        raise UserError(
            f"--address {address}: the cluster wants its token: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=..."
        ) from None


def submit(client: JobSubmissionClient, job: Sequence[str], folder: Path) -> str:
    """Id of a submission of `python -m JOB...` with the folder and this package; raises UserError for what cannot be sent."""
    module = folder / f"{job[0].replace('.', '/')}.py"
    if not module.exists():
        raise UserError(f"{job[0]}: no such job in {folder}: name one as jobs.train, from the repository's root")
    environment = {"working_dir": str(folder), "py_modules": [str(Path(longer.__file__).parent)]}
    try:
        return client.submit_job(entrypoint=shlex.join(["python", "-m", *job]), runtime_env=environment)
    except ValueError as error:  # of Ray's limit on the size of what travels
        raise UserError(f"{folder}: {one_line(error)} Name what need not travel in .rayignore") from None


async def follow(client: JobSubmissionClient, submission: str) -> int:
    """The exit code of the job, after its end; its lines are printed as they come, each once, lost connections or not."""
    num_printed = 0
    while not client.get_job_status(submission).is_terminal():
        num_printed = await _print_lines(client, submission, num_printed)
        await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
    _print(client.get_job_logs(submission)[num_printed:])
    info = client.get_job_info(submission)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.driver_exit_code is None or info.driver_exit_code < 0:  # stopped, killed, or never started
        say("submit", f"{submission} {info.status}: {info.message}")
    return max(info.driver_exit_code or 1, 1)


async def _print_lines(client: JobSubmissionClient, submission: str, num_printed: int) -> int:
    """Prints the log from its `num_printed`th character on, until it or the connection ends; how much is then printed."""
    place = 0
    try:
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
    """Submits, follows, and gives the job's exit code; 2 for a mistake, here or there."""
    parser = argparse.ArgumentParser(
        prog="longer.submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--address",
        default=os.environ.get(_ADDRESS, "http://127.0.0.1:8265"),
        help=f"URL of the cluster's dashboard (default: {_ADDRESS}, or port 8265 here)",
    )
    parser.add_argument("job", nargs="+", help="the job and its flags, after --")
    args = parser.parse_args(argv)
    client = connect(args.address)
    submission = submit(client, args.job, Path.cwd())
    say("submit", f"{submission} runs {args.job[0]} on {args.address}")
    try:
        return asyncio.run(follow(client, submission))
    except requests.exceptions.ConnectionError:
        raise UserError(f"--address {args.address}: the cluster no longer answers; {_goes_on(submission)}") from None
    except KeyboardInterrupt:
        say("submit", _goes_on(submission))
        return _INTERRUPTED


def _goes_on(submission: str) -> str:
    return f"the job goes on: see `ray job logs --follow {submission}`, end it with `ray job stop {submission}`"


def main() -> int:
    """The exit code of a run; a UserError is one line and code 2."""
    logging.disable(logging.WARNING)  # Ray tells of uploads and closed connections
    try:
        return run()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
