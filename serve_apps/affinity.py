"""Which replica a session belongs to: the ring of Serve's ConsistentHashRouter, so that a replica can tell what came astray."""

import bisect
from collections import Counter
from collections.abc import Iterable
from urllib.parse import quote

import mmh3
from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import CONSISTENT_HASH_SEED

_NUM_VIRTUAL_NODES = 100

ROUTER = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    request_router_kwargs={"num_virtual_nodes": _NUM_VIRTUAL_NODES, "num_fallback_replicas": 2},
)


class Ring:
    """The owner of each session among these replicas, as the router chooses it while the owner has room."""

    def __init__(self, replica_ids: Iterable[str]) -> None:
        self.replica_ids = frozenset(replica_ids)
        points = [(_hash(f"{one}:{node}"), one) for one in self.replica_ids for node in range(_NUM_VIRTUAL_NODES)]
        points.sort(key=lambda point: point[0])
        self._hashes, self._owners = [point[0] for point in points], [point[1] for point in points]

    def owner(self, session: str) -> str:
        return self._owners[bisect.bisect_right(self._hashes, _hash(session)) % len(self._owners)]


class Affinity:
    """Counts score requests and events that came astray to the replica `own`: without a session, or of a user who is another
    replica's, which then was full or had not been there, or did not answer its part of a batch. Of a batch, each request is counted
    by the replica that has answered it. The second needs the ring, so it is told by the replicas last seen; the header is not
    believed."""

    def __init__(self, own: str) -> None:
        self._own = own
        self.ring: Ring | None = None
        self.lost: Counter[str] = Counter(no_session=0, other_replica=0)

    def see(self, replica_ids: Iterable[str]) -> None:
        self.ring = Ring({*replica_ids, self._own})

    def owner(self, user_id: int | str) -> str:
        """The replica whose user it is; this one, as long as it knows no other."""
        return self.ring.owner(session_of(user_id)) if self.ring else self._own

    def is_own(self, user_id: int | str) -> bool:
        return self.owner(user_id) == self._own

    def count(self, user_id: int | str, has_session: bool) -> None:
        if not has_session:
            self.lost["no_session"] += 1
        elif not self.is_own(user_id):
            self.lost["other_replica"] += 1


def session_of(user_id: int | str) -> str:
    """The session that the user's requests are sent with: headers are ASCII, ids need not be."""
    return quote(str(user_id), safe="")


def _hash(key: str) -> int:
    return mmh3.hash64(key.encode(), seed=CONSISTENT_HASH_SEED, signed=False)[0]
