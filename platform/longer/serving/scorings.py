"""Requests on their way to their outcomes: as sent, prepared, and in waves of different users. torch, but no HTTP and no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy.typing as npt
import pyarrow as pa

from longer.data.items import ItemTable
from longer.errors import UserError
from longer.hashing import stable_keys
from longer.serving.pending import Pending
from longer.serving.requests import EventsRequest, RequestReader, ScoreRequest, ScoreResult, now_ms
from longer.serving.store import BATCH_USERS

P = TypeVar("P", bound=Pending)


@dataclass
class Asked(Pending):
    """A score request whose candidates are keys and numbers."""

    candidates: dict[str, npt.NDArray] = field(default_factory=dict)
    items: ItemTable | None = None
    result: ScoreResult | None = None

    @property
    def outcome(self) -> ScoreResult | UserError | None:
        return self.result or self.error


@dataclass(eq=False)
class Scoring:
    """A score request on its way to its outcome; `asked` is what `prepare` has made of it."""

    request: ScoreRequest
    asked: Asked | UserError | None = None

    @property
    def outcome(self) -> ScoreResult | UserError | None:
        """None as long as it has to be attempted again."""
        return self.asked.outcome if isinstance(self.asked, Asked) else self.asked


def prepare(scorings: Sequence[Scoring], reader: RequestReader, items: ItemTable | None) -> None:
    """Those that are new have users, times, events and candidates of this catalogue, or their error; the others its candidates."""
    new = [one for one in scorings if one.asked is None]
    events = reader.events([one.request for one in new])
    for one, own in zip(new, events, strict=True):
        one.asked = _asked(one.request, own, reader, items)
    for one in scorings:
        if isinstance(one.asked, Asked) and one.asked.items is not items:  # the tables have moved meanwhile
            one.asked.items, one.asked.candidates = items, reader.candidates(one.request, items)


def _asked(
    request: ScoreRequest, events: pa.Table | UserError | None, reader: RequestReader, items: ItemTable | None
) -> Asked | UserError:
    try:
        user_id, request_ts = reader.user(request.user_id), reader.time(request.request_ts)
        candidates = reader.candidates(request, items)
    except UserError as error:
        return error
    if isinstance(events, UserError):
        return events
    return Asked(user_id, int(stable_keys(user_id)[0]), request_ts, events, candidates=candidates, items=items)


def prepared_events(requests: Sequence[EventsRequest], reader: RequestReader) -> list[Pending | UserError]:
    """Each with its user and events, as of now, or its error."""
    events = reader.events(requests)
    return [_with_events(request, own, reader) for request, own in zip(requests, events, strict=True)]


def _with_events(
    request: EventsRequest, events: pa.Table | UserError | None, reader: RequestReader
) -> Pending | UserError:
    try:
        user_id = reader.user(request.user_id)
    except UserError as error:
        return error
    if isinstance(events, UserError):
        return events
    return Pending(user_id, int(stable_keys(user_id)[0]), now_ms(), events)


def waves(requests: Sequence[P]) -> list[list[P]]:
    """The requests in waves of different users, at most `BATCH_USERS`; what a user asks later comes in a later wave."""
    waves: list[list[P]] = []
    asked: dict[int, int] = {}
    for request in requests:
        number = asked.get(request.user_key, 0)
        asked[request.user_key] = number + 1
        if number == len(waves):
            waves.append([])
        waves[number].append(request)
    return [wave[n : n + BATCH_USERS] for wave in waves for n in range(0, len(wave), BATCH_USERS)]
