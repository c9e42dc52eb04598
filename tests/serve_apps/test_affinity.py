"""A replica knows which sessions are its own."""

from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from longer.ring import Ring, session_of
from serve_apps.affinity import ROUTER, Affinity


def test_the_ring_is_the_routers() -> None:
    names = ["abc", "def", "ghi"]
    router = ConsistentHashRouter.__new__(ConsistentHashRouter)
    router._num_virtual_nodes = ROUTER.request_router_kwargs["num_virtual_nodes"]
    router._num_fallback_replicas = 0
    router._deployment_id = DeploymentID("scoring")
    router._rebuild_ring(frozenset(ReplicaID(name, DeploymentID("scoring")) for name in names))
    ring = Ring(names)
    sessions = [f"user {n}" for n in range(500)]
    owners = [ring.owner(session) for session in sessions]
    assert owners == [router._lookup_ranked_replicas(session)[0].unique_id for session in sessions]
    assert set(owners) == set(names)


def test_requests_without_a_session_or_of_another_replicas_are_lost_and_nobodys_until_the_others_are_known() -> None:
    affinity, users = Affinity("abc"), [*range(100), *(f"Zoë {n}" for n in range(100))]
    for user in users:
        affinity.count(user, has_session=True)
    assert affinity.lost == {"no_session": 0, "other_replica": 0}
    affinity.see({"def": None, "ghi": None})
    for user in [*users, 5]:
        affinity.count(user, has_session=user != 5)
    ring = Ring(["abc", "def", "ghi"])
    not_own = [user for user in users if ring.owner(session_of(user)) != "abc"]
    assert affinity.lost == {"no_session": 2, "other_replica": len([user for user in not_own if user != 5])}
    assert [user for user in users if not affinity.is_own(user)] == not_own
