"""Where a client's calls go: straight to the replica whose user it is, where the service says that it can be reached so."""

import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from longer.ring import Ring

_REFRESH_S = 10.0
"""How often a client asks for the replicas."""
_AVOID_S = 30.0
"""How long it leaves one alone that it could not reach."""


class ReplicaUrl(NamedTuple):
    """A replica, and where it answers itself."""

    replica: str
    url: str


class ReplicaUrls:
    """The replica of a session, or any, as the service at `url` told it within the last ten seconds, or last told it.

    What cannot be reached is not tried for a while: a client elsewhere may see the front only. Of a front that speaks TLS no
    replica is used, as they do not, and on loopback only what is asked for there.
    """

    def __init__(self, url: str, ask: Callable[[], Mapping[str, str | None] | None]) -> None:
        """`ask` gives the URL of each replica; None if it cannot be told at the moment."""
        self._front, self._ask = urlsplit(url), ask
        self._ring: Ring | None = None
        self._urls: dict[str, str] = {}
        self._asked_s = -_REFRESH_S
        self._avoided_until_s: dict[str, float] = {}

    def of(self, session: str | None) -> ReplicaUrl | None:
        """Without a session, any that can be reached; None: through the front."""
        if self._front.scheme != "http":
            return None
        if time.monotonic() - self._asked_s >= _REFRESH_S:
            self._refresh()
        if self._ring is None:
            return None
        replicas = [*self._urls] if session is None else [self._ring.owner(session)]
        found = list(filter(self._may_be_asked, replicas))
        return ReplicaUrl(replica := random.choice(found), self._urls[replica]) if found else None

    def avoid(self, url: str) -> None:
        """It could not be reached: perhaps there are other replicas now."""
        self.spare(url, _AVOID_S)
        self._asked_s = -_REFRESH_S

    def spare(self, url: str, for_s: float) -> None:
        """It asked to be left alone for so long."""
        self._avoided_until_s[url] = time.monotonic() + for_s

    def _refresh(self) -> None:
        told = self._ask()
        self._asked_s = time.monotonic()
        if told is not None:
            self._ring = Ring(told) if told else None
            self._urls = {replica: url for replica, url in told.items() if url and self._is_reachable(url)}
            self._avoided_until_s = {url: s for url, s in self._avoided_until_s.items() if url in self._urls.values()}

    def _may_be_asked(self, replica: str) -> bool:
        url = self._urls.get(replica)
        return url is not None and time.monotonic() >= self._avoided_until_s.get(url, 0.0)

    def _is_reachable(self, url: str) -> bool:
        return not _is_loopback(urlsplit(url).hostname) or _is_loopback(self._front.hostname)


def _is_loopback(host: str | None) -> bool:
    return host in ("localhost", "::1") or (host or "").startswith("127.")
