"""How every job starts and ends: settings from the command line, a Ray to run on, one line for a user's mistake or Ctrl-C."""

import keyword
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import longer
from longer.cli import parse_settings
from longer.config import SUBMITTED, RaySettings, Settings
from longer.errors import StorageError, UserError
from longer.progress import say

_FOLDERS_OF_JOBS = "working_dir_files"  # where Ray keeps them
_KINDS = {"UserError": UserError, "StorageError": StorageError}
_USER_ERROR_LINE = re.compile(rf"^longer\.errors\.({'|'.join(_KINDS)}): (.+)$", re.MULTILINE)
_ANSWERS_WITHIN_S = 5.0
_CAUSES = "cause", "controller_failure", "__cause__", "__context__"
"""Ray's tasks', Ray Train's, Python's own."""


def run_job(
    description: str,
    run: Callable[..., Any],
    flags: Sequence[tuple[str, ...]] = (),
    needs_ray: bool = True,
    short: Sequence[str] = (),
    check: Callable[[Settings], Any] | None = None,
) -> Any:
    """Runs a job and gives what it returns; exits with 2 and one line on stderr for a UserError; bugs keep their traceback.

    Ctrl-C and SIGTERM end it with one line, too, and 130 or 143, as shells have it.

    `run` gets the settings, and each of its own `flags` (`parse_settings`) as a keyword argument, `from_` where Python has a
    word of its own. Settings named in `short` may be given without their section. `check` raises the UserError that a look at the
    tables tells, before a Ray is started for nothing.
    """
    ended_by = [signal.SIGINT]
    try:
        settings, given = parse_settings(description, flags=flags, short=short)
        _check_root(settings)
        with _terminated_as_interrupted(ended_by):
            if check:
                check(settings)
            if needs_ray:
                start_ray(settings.ray)
            return run(settings, **{_argument(name): value for name, value in given.items()})
    except Exception as error:
        mistake = user_error_in(error)
        if mistake is None:
            raise
        print(mistake, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: what is finished stays, and the same command does the rest", file=sys.stderr)
        sys.exit(128 + ended_by[-1])


@contextmanager
def _terminated_as_interrupted(ended_by: list[signal.Signals]) -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt, and ends `ended_by`."""

    def interrupt(*_: Any) -> None:
        ended_by.append(signal.SIGTERM)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _argument(flag: str) -> str:
    return f"{flag}_" if keyword.iskeyword(flag) else flag.replace("-", "_")


def _check_root(settings: Settings) -> None:
    """A submitted job runs in a folder of Ray's, removed with all in it; `Settings` refuses relative roots."""
    root = Path(settings.root).resolve()
    here = "://" not in settings.root
    if SUBMITTED in os.environ and here and (root.is_relative_to(Path.cwd()) or _FOLDERS_OF_JOBS in root.parts):
        raise UserError(
            f"root={settings.root}: what a submitted job writes beside its code is lost: use s3://, or an absolute path "
            "that every node sees"
        )


def start_ray(settings: RaySettings) -> None:
    """Connects to the cluster of the settings, or starts a local Ray, unless this process has one already.

    A UserError if the cluster does not answer.

    A local Ray is authenticated by a token: the environment's (RAY_AUTH_MODE, RAY_AUTH_TOKEN) or the one that Ray keeps in
    ~/.ray. Setting the environment here would be too late: Ray reads it when first imported.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    _set_up_ray_data(settings)
    if ray.is_initialized():
        return
    at_sigterm = signal.getsignal(signal.SIGTERM)
    if settings.cluster is None:
        # All workers share the cores: threads that spin while they wait would keep others from theirs.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ["PYTHONPATH"] = _worker_path()  # inherited; a runtime_env would waste the workers that Ray prestarts
        ray.init(
            address="local",  # without it, Ray would connect to one that `ray start` has started here
            num_cpus=settings.num_cpus,
            object_store_memory=settings.object_store_bytes,
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,  # workers' own lines come by `training.relay`; the rest is in Ray's log folder
        )
    else:
        _connect(settings.cluster)
    if callable(at_sigterm):
        signal.signal(signal.SIGTERM, at_sigterm)  # Ray's own prints where the process was, and aborts it
    _tell_of_missing_pools(settings)


def _connect(address: str) -> None:
    """To a running cluster; a UserError if none answers there, or not to this token."""
    import ray
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray.exceptions import AuthenticationError

    environment = {} if SUBMITTED in os.environ else {"py_modules": [str(Path(longer.__file__).parent)]}
    try:
        if "://" not in address:  # Ray itself would wait there for ten minutes and more
            host, _, port = canonicalize_bootstrap_address_or_die(address).rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _ANSWERS_WITHIN_S).close()
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, runtime_env=environment)
    except (ConnectionError, TimeoutError, socket.gaierror, ValueError, AuthenticationError):
        raise UserError(
            f"ray.address={address}: no Ray answers there, or it wants another token than this shell's: start one "
            "(docs/cluster.md), or export RAY_AUTH_MODE=token and the RAY_AUTH_TOKEN that it was started with"
        ) from None


def _tell_of_missing_pools(settings: RaySettings) -> None:
    """A line if work would wait for a node that is not there: for ever, unless an autoscaler starts one."""
    import ray

    for label, pool in settings.place(num_gpus=0).items():
        labels = [node["Labels"] for node in ray.nodes() if node["Alive"]]
        if all(of_node.get(label) != pool for of_node in labels):
            known = sorted({name for of_node in labels for name in of_node if not name.startswith("ray.io/")})
            say(
                "ray",
                f"no node has the label {label}={pool} (ray.pool_label) so far, and work waits for one; nodes have "
                f"{', '.join(known) or 'no labels of yours'}",
            )


def user_error_in(error: BaseException | None) -> UserError | None:
    """The UserError that `error` is or was caused by, through Ray's wrapping of what a task raised.

    Ray Data and Ray Train lose the cause itself when the error crosses processes; its one line is still in the text.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, UserError) and type(error).__module__ == UserError.__module__:  # not Ray's wrapper of one
            return error
        if said := _USER_ERROR_LINE.search(str(error)):
            return _KINDS[said[1]](said[2])
        error = next((e for name in _CAUSES if (e := getattr(error, name, None))), None)
    return None


def _worker_path() -> str:
    """PYTHONPATH of workers: the package's folder and the jobs', absolute, since workers run elsewhere."""
    return os.pathsep.join(os.path.abspath(path) for path in sys.path)


def _set_up_ray_data(settings: RaySettings) -> None:
    """Ray Data is quiet; its tasks, and those of `data.ray_tasks`, run on the nodes for work without GPUs."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.label_selector = settings.place(num_gpus=0)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised, and printed once
