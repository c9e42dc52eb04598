"""Which replica a session belongs to, as Serve's ConsistentHashRouter has it, so that a replica can tell what came astray."""

from collections import Counter
from collections.abc import Mapping

from ray.serve.config import RequestRouterConfig

from longer.ring import NUM_VIRTUAL_NODES, Ring, session_of

ROUTER = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",  # type: ignore[arg-type]
    request_router_kwargs={"num_virtual_nodes": NUM_VIRTUAL_NODES, "num_fallback_replicas": 2},
)


class Affinity:
    """Counts score requests and events that came astray to the replica `own`: without a session, or of a user who is another
    replica's, which then was full or had not been there, or did not answer its part of a batch. Of a batch, each request is counted
    by the replica that has answered it. The second needs the ring, so it is told by the replicas last seen; the header is not
    believed."""

    def __init__(self, own: str, own_url: str | None = None) -> None:
        self._own = own
        self.ring: Ring | None = None
        self.urls: dict[str, str | None] = {own: own_url}
        """Where each replica of the ring answers itself; None if only through Serve's proxy."""
        self.lost: Counter[str] = Counter(no_session=0, other_replica=0)

    def see(self, urls: Mapping[str, str | None]) -> None:
        """The replicas that run, this one perhaps among them."""
        self.urls = {self._own: self.urls[self._own], **urls}
        self.ring = Ring(self.urls)

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
