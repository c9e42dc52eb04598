"""Where every call passes, whatever protocol it comes by: token, time, what went wrong, and what is noted of it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from longer.errors import UserError
from serve_apps.access import TIMEOUT_HEADER, Gate, reason_of, status_of
from serve_apps.access_log import AccessLog, Call
from serve_apps.metrics import ReplicaMetrics

_HUNG_UP = 499
"""Status, in metrics and the access log, of a call whose caller has gone before it was answered."""
_logger = logging.getLogger("ray.serve")

T = TypeVar("T")


@dataclass(frozen=True)
class Refusal:
    """Why a call has no answer: an HTTP status, and a line that repeats nothing of what was sent."""

    status: int
    reason: str


class Desk:
    """Calls are answered or refused, and counted."""

    def __init__(self, gate: Gate, metrics: ReplicaMetrics, access_log: AccessLog | None) -> None:
        self._gate, self._metrics, self._access_log = gate, metrics, access_log

    async def attempt(
        self, route: str, headers: Mapping[str, str], work: Callable[[Call], Awaitable[T]]
    ) -> T | Refusal:
        """The work's answer, or what went wrong, with the token checked before and the time bounded."""
        call = Call(route)
        outcome: T | Refusal
        try:
            self._gate.check_token(headers.get("authorization"))
            call.timeout_s = self._gate.time_left_s(headers.get(TIMEOUT_HEADER))
            async with asyncio.timeout(call.timeout_s):
                outcome = await work(call)
        except asyncio.CancelledError:
            self._note(call, _HUNG_UP)
            raise
        except TimeoutError:
            outcome = Refusal(504, "not answered in time: allow more, or send fewer candidates")
        except UserError as error:
            outcome = Refusal(status_of(error), reason_of(error))
        except Exception:
            _logger.exception("a call to %s failed", route)
            outcome = Refusal(500, "internal error: the replica's log has it")
        self._note(call, outcome.status if isinstance(outcome, Refusal) else 200)
        return outcome

    def turned_away(self) -> None:
        """Notes a call that found no room, of which nothing was read."""
        self._note(Call("no room"), 503)

    def _note(self, call: Call, status: int) -> None:
        latency_ms = call.latency_ms
        self._metrics.record(call.route, latency_ms, status)
        if self._access_log:
            self._access_log.note(call, status, latency_ms)
