"""Which replica a user's requests belong to: the ring of Serve's ConsistentHashRouter, for replicas and for clients."""

import bisect
from collections.abc import Iterable
from urllib.parse import quote

import mmh3

NUM_VIRTUAL_NODES = 100
_SEED = 0xF9B4CA77
"""Serve's own, not imported: a client has no need of the rest of Serve."""


class Ring:
    """The owner of each session among these replicas, as the router chooses it while the owner has room."""

    def __init__(self, replica_ids: Iterable[str]) -> None:
        self.replica_ids = frozenset(replica_ids)
        points = [(_hash(f"{one}:{node}"), one) for one in self.replica_ids for node in range(NUM_VIRTUAL_NODES)]
        points.sort(key=lambda point: point[0])
        self._hashes, self._owners = [point[0] for point in points], [point[1] for point in points]

    def owner(self, session: str) -> str:
        return self._owners[bisect.bisect_right(self._hashes, _hash(session)) % len(self._owners)]


def session_of(user_id: int | str) -> str:
    """The session that the user's requests are sent with: headers are ASCII, ids need not be."""
    return quote(str(user_id), safe="")


def _hash(key: str) -> int:
    return mmh3.hash64(key.encode(), seed=_SEED, signed=False)[0]
