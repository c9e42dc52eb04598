"""Scores candidates over HTTP with Ray Serve:

    serve run serve_apps.scoring:build_app checkpoint=runs/quickstart/checkpoints

POST   /v1/score        {"user_id", "candidates": ids or {"id", "features"}, "request_ts"?, "events"?, "top_k"?} -> scores by task
POST   /v1/score:batch  {"requests": several of these} -> one result each
POST   /v1/events       {"user_id", "events": [{"item_id", "event_ts", "action"?, "features"?}]}: newest events of a user
DELETE /v1/users/ID     drops what the replicas hold of a user
GET    /v1/replicas     where each replica answers itself
GET    /v1/model        what is served              GET /v1/stats    this replica's cache
GET    /v1/status       all replicas, last minute   GET /            the same as a page, with a form to score a user by hand
GET    /healthz         the process answers         GET /readyz      the scorer answers

Over gRPC, where the Serve config asks for it: platform/longer/rpc/scoring.proto.

Send `x-session-id: USER` (percent-encoded if not ASCII) with every request: it is hashed to a replica, so that a user's state is
found where it was left, and so are the events sent for it. A request that comes without it, or to another replica than its own
because that one is full or has just started, is answered from the table all the same, and counted. `x-timeout-ms` says how long
an answer is worth waiting for. The scorer is the ingress (a second hop would double the latency), and torch runs in one thread
beside the event loop. With `direct_host` replicas listen themselves too, and clients that know the ring send a user's calls
straight to hers (`direct.py`): all that is said here is so for those calls as well.

Events sent online are known to one replica, the user's where it answers and else the one that they came to, until it drops them for
their number or age, or is killed; where it stops, with `state_dump`, they are known to whose user she is then, some seconds later.
A score request that must not miss any brings them along. The same event counts once however often it is sent, and wherever the
table has it too (`longer/serving/online.py`). A call of several users
needs no session: any replica takes it, has each part scored by the replica whose users they are, and puts the answers together.

States need not go with their replica: with `state_dump` a replica that stops (for a new version, for fewer of them, with its node;
not one that is killed) dumps them with the events sent to it, and those that run take in what is theirs by the ring; with
`warm_users` a replica encodes the table's most active users. Both happen in the background after it is ready (`keeping.py`).

DELETE is answered with 200 when every replica has dropped the user's state and events, of those that run as far as the answering
replica has been told; one that has started within the last moments may not be among them. Requests that are being answered
meanwhile may bring a state back, and the sequence table is what it was. No dump brings the user back.
"""

import sys
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.schema import LoggingConfig

from longer.config import RaySettings
from longer.errors import UserError
from serve_apps.affinity import ROUTER
from serve_apps.arguments import ScoringArgs, resolved
from serve_apps.replica import ScoringReplica
from serve_apps.service import RETRY_AFTER_S

__all__ = ["ScoringArgs", "build_app"]

IN_ONE_LOOP = {"env_vars": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}}
"""Runtime environment of replicas: their calls share Ray's own event loop, which saves each call two changes of thread. It is for
code that never blocks it."""
_HEALTH_CHECK_S = 10.0
_METRICS_S = (1.0, 10.0)


def replica_options(args: ScoringArgs) -> dict[str, Any]:
    """Ray's options of a replica."""
    where = RaySettings(pool_label=args.pool_label).options(args.num_cpus, args.num_gpus)
    return {**where, "runtime_env": IN_ONE_LOOP}


def build_app(args: ScoringArgs) -> serve.Application:
    """The Serve application; replicas come and go slowly, since each change remaps users away from their states.

    The checkpoint is chosen here, once, so that all replicas serve the same one.
    """
    try:
        args = resolved(args)
    except UserError as error:
        if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
            raise  # `serve deploy` builds in a task, whose error is reported with the application's status
        print(error, file=sys.stderr)
        sys.exit(2)  # `serve run` would show a traceback
    return ScoringReplica.options(  # type: ignore[attr-defined]
        name="scoring",
        ray_actor_options=replica_options(args),
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        autoscaling_config=AutoscalingConfig(
            min_replicas=args.num_replicas,
            max_replicas=args.max_replicas,
            target_ongoing_requests=args.target_ongoing_requests or args.max_batch_requests,
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
            metrics_interval_s=min(max(args.upscale_delay_s / 3, _METRICS_S[0]), _METRICS_S[1]),
            policy=AutoscalingPolicy(
                policy_function="longer.autoscaling:ReplicaPolicy",
                policy_kwargs={"warm_s": args.warm_states_s, "gpu_memory_share": args.max_gpu_memory_share},
            ),
        ),
        graceful_shutdown_timeout_s=args.stop_within_s,
        request_router_config=ROUTER,
        health_check_period_s=min(_HEALTH_CHECK_S, args.refresh_s),  # which is when a replica looks for newer sequences
        logging_config=LoggingConfig(enable_access_log=False),
    ).bind(args)
