"""The compiler's caches on disk, filled by processes side by side: one alone takes minutes for the hundred pieces of a width.

Pieces for one user are others than those for several, and each way computes in its own types. Other history lengths need few more.
"""

import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess

from benchmarks.model_arms.sizes import model_settings
from benchmarks.state_arms.states import append, recompute
from benchmarks.state_arms.users import Users
from longer.model.engine import StateEngine
from longer.model.state_layout import Precision

What = tuple[str, int]
"""What is done, and the users of its batches: `recompute`, or `growth` or `scores` by a way."""

RECOMPUTED: What = ("recompute", 1)
SERVED, EAGER = (
    tuple((f"{what} {way}", num_users) for num_users in (1, 2) for what in ("growth", "scores"))
    for way in ("graph", "eager")
)

_THREADS = 4
"""Of each process's compiler."""
_MOST_S = 120


def start(wanted: Sequence[tuple[tuple[int, int], What]], precision: Precision) -> list[BaseProcess]:
    """A process for each event width, history length and what is wanted of it; what fails there is compiled later."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(_THREADS)
    spawn = multiprocessing.get_context("spawn")
    running = [spawn.Process(target=_compile, args=(*size, precision, *what), daemon=True) for size, what in wanted]
    for process in running:
        process.start()
    return running


def wait(running: Sequence[BaseProcess]) -> None:
    """Until none is left, for nothing is timed beside them."""
    deadline = time.perf_counter() + _MOST_S
    for process in running:
        process.join(max(0.0, deadline - time.perf_counter()))
        process.kill()  # what is not ready is compiled where it is measured
        process.join()


def _compile(event_width: int, num_events: int, precision: Precision, name: str, num_users: int) -> None:
    users = Users(model_settings(event_width, num_events), num_users, precision)
    if (name, num_users) == RECOMPUTED:
        list(recompute(users, users.asked(1, 100)))
        return
    what, of_way = name.split()
    [way] = [way for way in users.ways if way.name == of_way]
    if what == "growth":
        for num_new in (25, 1):  # over groups, and one: sizes of one have pieces of their own
            append(users, way, num_users, num_new)
        return
    plain, asked = StateEngine(users.model, users.pool, is_plain=True), users.asked(num_users, 16)
    states = plain.encode(users.events(num_users, 0, num_events), users.slots(num_users))
    way.score(states, asked.request_ts_R, asked.candidates)
