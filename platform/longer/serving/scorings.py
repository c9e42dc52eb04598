"""Requests on their way to their outcomes: as sent, prepared, and in waves of different users. torch, but no HTTP and no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa

from longer.data.items import ItemTable
from longer.errors import UserError
from longer.serving.pending import Pending
from longer.serving.requests import EventsRequest, Features, RequestReader, ScoreRequest, ScoreResult, User, now_ms
from longer.serving.room import BATCH_USERS

P = TypeVar("P", bound=Pending)


@dataclass
class Asked(Pending):
    """A score request whose candidates are keys and numbers."""

    candidates: Features = field(default_factory=dict)
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
    requests = [one.request for one in new]
    users, events = reader.users(requests), reader.events(requests)
    for one, user, own, found in zip(new, users, events, reader.candidates(requests, items), strict=True):
        one.asked = _asked(user, reader.time(one.request.request_ts), found, own, items)
    moved = [one for one in scorings if isinstance(one.asked, Asked) and one.asked.items is not items]
    for one, found in zip(moved, reader.candidates([one.request for one in moved], items), strict=True):
        assert isinstance(one.asked, Asked)
        assert isinstance(found, dict)  # as it was of the catalogue before
        one.asked.items, one.asked.candidates = items, found


def _asked(
    user: User | UserError,
    request_ts: int | UserError,
    candidates: Features | UserError,
    events: pa.Table | UserError | None,
    items: ItemTable | None,
) -> Asked | UserError:
    """The first error is what the caller is told."""
    if isinstance(user, UserError):
        return user
    if isinstance(request_ts, UserError):
        return request_ts
    if isinstance(candidates, UserError):
        return candidates
    if isinstance(events, UserError):
        return events
    return Asked(user.id, user.key, request_ts, events, candidates=candidates, items=items)


def prepared_events(requests: Sequence[EventsRequest], reader: RequestReader) -> list[Pending | UserError]:
    """Each with its user and events, as of now, or its error."""
    return [
        user if isinstance(user, UserError) else own if isinstance(own, UserError) else Pending(*user, now_ms(), own)
        for user, own in zip(reader.users(requests), reader.events(requests), strict=True)
    ]


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
