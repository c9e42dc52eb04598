"""One scorer with its cache, whatever protocol is spoken. Everything that touches the scorer runs in its one worker thread;
what has to be read of the sequence table for it is read in others."""

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from ray import serve
from ray.serve._private.logging_utils import get_serve_logs_dir
from ray.serve.schema import ReplicaRank

from longer.errors import UserError
from longer.ring import session_of
from longer.serving.reads import TableReads
from longer.serving.scorer import EventsRequest, EventsResult, Scorer, ScoreRequest, ScoreResult, Scoring
from serve_apps.access import Gate
from serve_apps.access_log import AccessLog, Call
from serve_apps.account import service_status
from serve_apps.affinity import Affinity
from serve_apps.arguments import ScoringArgs
from serve_apps.batcher import MicroBatcher, with_error_for_future
from serve_apps.desk import Desk
from serve_apps.direct import DirectServer
from serve_apps.holdings import Ledger
from serve_apps.keeping import StateKeeper
from serve_apps.metrics import ReplicaMetrics
from serve_apps.newer_tables import NewerTables
from serve_apps.parts import Parts
from serve_apps.peers import Peers
from serve_apps.protocol import Asked, BodyError
from serve_apps.rollout import Rollouts
from serve_apps.teller import Teller
from serve_apps.upkeep import Upkeep

RETRY_AFTER_S = 1
_SWITCH_S = 0.0005
"""How long the scorer's thread may hold Python while the event loop waits: by default 5 ms at each of a call's several turns."""
_OLDEST_AFTER = 100
"""Second generations, ten times as many as usual, after which the collector looks at all: that takes tenths of a second."""

Outcome = ScoreResult | UserError
T = TypeVar("T")


class ScoringService:
    """What `serve_apps/scoring.py` says but for the protocols, which derive from it."""

    def __init__(self, args: ScoringArgs) -> None:
        sys.setswitchinterval(_SWITCH_S)
        self._args = args
        self._gate = Gate(args.token(), args.timeout_s, args.max_body_bytes)
        self._worker = ThreadPoolExecutor(
            1, "scorer", initializer=torch.set_num_threads, initargs=(args.torch_threads,)
        )
        self._scorer = self._worker.submit(self._load).result()
        self._replica = serve.get_replica_context().replica_id.unique_id
        metrics = ReplicaMetrics()
        self._keeper = StateKeeper(args, self._scorer, self._replica, self._in_worker)
        self._access_log = AccessLog(get_serve_logs_dir(), self._replica) if args.access_log else None
        self._desk = Desk(self._gate, metrics, self._access_log)
        self._direct = self._direct_server(args)
        self._own_url = self._direct.url if self._direct else None
        self._affinity, self._peers = Affinity(self._replica, self._own_url), Peers()
        size = args.max_batch_requests
        self._parts = Parts(self._affinity, self._peers, most_waiting=args.max_ongoing_requests // 2)
        self._reads = TableReads(self._scorer.history, 2 * size)
        self._scores = MicroBatcher(
            self._worker, self._score, size, metrics.record_batch, key=lambda one: one.request.user_id
        )
        self._events = MicroBatcher[EventsRequest, EventsResult | UserError](
            self._worker, self._scorer.add_events, size, lambda _: None
        )
        self._rollouts = Rollouts(
            self._scorer,
            args.checkpoint,
            self._in_worker,
            self._warm_ups,
            ask_peers=partial(self._of_peers, self.served_checkpoint),
        )
        self._teller = Teller(
            args,
            self._replica,
            self._scorer,
            Ledger(self._scorer, self._in_worker),
            metrics,
            self._access_log,
            self._affinity,
            self._keeper,
            self._rollouts,
            num_queued=lambda: len(self._scores),
            num_direct=lambda: self._direct.num_ongoing if self._direct else 0,
        )
        self._upkeep = Upkeep(
            NewerTables(self._scorer, self._in_worker),
            self._affinity,
            self._keeper,
            self._rollouts,
            ask_urls=partial(self._peers.ask, self.own_url),
            refresh_s=args.refresh_s,
        )
        self._teller.tell()
        gc.set_threshold(*gc.get_threshold()[:2], _OLDEST_AFTER)
        gc.freeze()

    def _direct_server(self, args: ScoringArgs) -> DirectServer | None:
        if not args.direct_host:
            return None
        places = args.max_ongoing_requests
        return DirectServer(args.direct_host, args.direct_ports, places, RETRY_AFTER_S, self._desk.turned_away)

    def _load(self) -> Scorer:
        args = self._args
        device = "cuda" if args.num_gpus else "cpu"
        assert args.sequences  # build_app found it
        scorer = Scorer(
            args.checkpoint,
            args.sequences,
            args.cache_bytes,
            args.items,
            args.sequences_version,
            device,
            args.event_limits,
            args.host_cache_bytes,
            args.state_precision,
        )
        if args.sequences.startswith("s3://"):
            from longer.s3 import be_quick

            be_quick(args.table_silence_s)
        for warm_up in self._warm_ups(scorer):
            warm_up()
        return scorer

    def _warm_ups(self, scorer: Scorer) -> Iterator[Callable[[], None]]:
        return scorer.warm_ups(self._args.max_batch_requests, self._args.usual_candidates)

    # -- calls --------------------------------------------------------------------------------------------------------

    async def score_one(self, asked: Asked, session: str | None, call: Call) -> tuple[ScoreResult, str]:
        """The scores that the call asks for, and the version of the model that they are of."""
        call.ends("parse")
        call.num_users, call.num_candidates = 1, len(asked.request.item_ids)
        self._affinity.count(asked.request.user_id, bool(session))
        [(outcome, call.model_version)] = await self._scored([asked.request], call)
        if isinstance(outcome, UserError):
            raise outcome
        call.source = outcome.source
        self._teller.recent.add(call.latency_ms, outcome.source)
        return outcome, call.model_version

    async def score_several(self, several: Sequence[Asked], call: Call) -> list[tuple[Outcome, str]]:
        """One outcome a request, in order, with the version of the model. Each is of the replica whose user it is, where that one
        answers while there is as much time again to score its part here."""
        call.ends("parse")
        call.num_users, call.num_candidates = len(several), sum(len(asked.request.item_ids) for asked in several)
        requests, scored = [asked.request for asked in several], partial(self._scored, call=call)
        outcomes = await self._parts.score(requests, scored, self.score_here, call)
        call.ends("owners")
        call.model_version = outcomes[-1][1]
        return outcomes

    async def _scored(self, requests: Sequence[ScoreRequest], call: Call) -> list[tuple[Outcome, str]]:
        answers = await self._scores.ask(*map(Scoring, requests))
        call.was_in(answers[-1][1])
        return [outcome for outcome, _ in answers]

    async def take_in(self, request: EventsRequest, session: str | None, call: Call) -> tuple[EventsResult, str]:
        """Takes in a user's newest events, or has the replica do so whose user she is; and which one did."""
        self._affinity.count(request.user_id, bool(session))
        call.num_users = 1
        taken = None
        if not self._affinity.is_own(request.user_id):
            taken = await self._peers.ask_owner(session_of(request.user_id), self.take_in_here, request)
        outcome, replica = taken or await self.take_in_here(request)
        if isinstance(outcome, UserError):
            raise outcome
        return outcome, replica

    async def forget_everywhere(self, user_id: int | str) -> tuple[int, int]:
        """The number of replicas, which all have dropped what they held of the user, and of those that held anything."""
        await self._keeper.mark_forgotten(user_id)
        held = await self.forget(user_id)
        others = await self._peers.ask(self.forget, user_id)
        if any(isinstance(outcome, BaseException) for outcome in others):
            raise BodyError(503, "not every replica has answered: send the same again")
        return len(others), sum([held, *others])

    async def replica_urls(self) -> dict[str, str | None]:
        """Where each replica answers itself, as of the last second."""
        await self._upkeep.look()
        return self._affinity.urls

    def about_model(self) -> dict[str, Any]:
        """The model that answers, and what it reads."""
        return self._teller.about_model()

    async def status(self) -> dict[str, Any]:
        """What all replicas hold and have done lately."""
        schema = self._scorer.info.schema
        asked = await self._peers.ask(self.account)
        told = [one for one in asked if isinstance(one, dict)] or [await self.account()]
        num_silent = max(len(self._affinity.urls), len(asked)) - len(told)
        ids = {"user_id": schema.user_id, "item_id": schema.item_id}
        return {"answered_by": self._replica, "ids": ids, **service_status(told, num_silent)}

    # -- in the worker's thread ---------------------------------------------------------------------------------------

    def _score(self, scorings: list[Scoring]) -> list[tuple[Outcome, str] | Future[None]]:
        """Each outcome with the version of the model that it is of; of who has none yet, what ends when the table has been read."""
        version = self._scorer.info.model_version
        unread = self._scorer.attempt(scorings)
        reads = dict(zip(map(id, unread), self._reads.start(unread), strict=True))
        return [reads[id(one.asked)] if one.outcome is None else (one.outcome, version) for one in scorings]

    async def _in_worker(self, function: Callable[..., Any], *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, with_error_for_future, function, *args)

    # -- called by other replicas -------------------------------------------------------------------------------------

    async def own_url(self) -> tuple[str, str | None]:
        """This replica, and where it answers itself."""
        return self._replica, self._own_url

    async def served_checkpoint(self) -> str:
        return self._rollouts.checkpoint

    async def score_here(self, requests: list[ScoreRequest]) -> list[tuple[Outcome, str]]:
        """Scores whosever users they are: what is sent on is not sent on again, and comes here too when its owner is full."""

        async def scored(part: list[ScoreRequest]) -> list[tuple[Outcome, str]]:
            return [outcome for outcome, _ in await self._scores.ask(*map(Scoring, part))]

        return await self._parts.answer(requests, scored)

    async def take_in_here(self, request: EventsRequest) -> tuple[EventsResult | UserError, str]:
        """Takes in events without looking whose they are: what is sent on is not sent on again."""
        [(outcome, _)] = await self._events.ask(request)
        return outcome, self._replica

    async def forget(self, user_id: int | str) -> bool:
        """Drops what this one holds of the user; whether it held anything."""
        return await self._in_worker(self._keeper.forget, user_id)

    async def account(self) -> dict[str, Any]:
        """What this replica holds, and what it has done since it started and lately."""
        return await self._teller.account()

    # -- called by Serve ----------------------------------------------------------------------------------------------

    async def reconfigure(self, user_config: dict[str, Any] | None, rank: ReplicaRank) -> None:
        """Goes over to the `checkpoint` of a `user_config`, or back to the arguments' one without any, between two batches; states
        become misses. Serve calls it at the start, with a new `user_config`, and, as it takes a rank, without one too.

        A checkpoint that cannot serve is refused: the model that serves goes on, and /v1/model says so.
        """
        await self._rollouts.ask(user_config)
        self._teller.tell()

    async def check_health(self) -> None:
        """Fails where the device no longer computes, or the worker hangs; then this replica is replaced.

        Which is when what else is due begins.
        """
        self._upkeep.begin()
        await self._in_worker(self._touch_device)
        self._teller.tell()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `longer/autoscaling.py` goes by, asked by Serve now and then. Async, as Serve runs in threads what is not."""
        return await self._teller.load()

    def _touch_device(self) -> None:
        """An error where the device no longer computes: a CUDA context does not recover from some."""
        torch.zeros(1, device=self._scorer.cache.pool.device).item()

    async def _of_peers(self, method: Callable[[], Awaitable[T]]) -> list[T]:
        return [one for one in await self._peers.ask(method) if not isinstance(one, BaseException)]

    async def __del__(self) -> None:
        """Serve calls it once the replica has answered all that came through it, before it ends."""
        try:
            if self._direct:
                await self._direct.close()
        finally:
            await self._leave()

    async def _leave(self) -> None:
        await self._keeper.leave()
        if self._access_log:
            self._access_log.close()
