"""The application's arguments, and the tables that they lead to."""

import os
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from longer.data.items import items_version
from longer.data.tables import open_version
from longer.errors import UserError, meant
from longer.files import filesystem, read_bytes
from longer.model.state_layout import Precision
from longer.serving.history import check_kept
from longer.serving.online import EventLimits
from longer.storage import Table
from longer.training.checkpoints import load_model
from serve_apps.protocol import Limits

TOKEN_VARIABLE = "LONGER_SCORING_TOKEN"
_DRAIN_MARGIN_S = 10.0


class ScoringArgs(BaseModel):
    """Arguments of the application; on the command line as NAME=VALUE, in a Serve config under `args`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _are_known(cls, given: Any) -> Any:
        for name in given if isinstance(given, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(
                    f"{name}: unknown argument: {meant(name, cls.model_fields)}serve_apps/arguments.py has all"
                )
        return given

    checkpoint: str = Field(description="A checkpoint, or the checkpoints table: then its served version.")
    sequences: str | None = Field(
        None, description="Path of the sequence table; null: tables/sequences beside checkpoints."
    )
    sequences_version: str | None = Field(None, description="Version to stay at; null follows the one served.")
    items: str | None = Field(None, description="Path of the item catalogue; null: tables/items beside checkpoints.")
    num_replicas: int = Field(1, ge=1, description="Fewest replicas.")
    max_replicas: int = Field(1, ge=1, description="Most replicas that autoscaling may reach.")
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="Requests in a replica above which autoscaling adds one; null: max_batch_requests."
    )
    upscale_delay_s: float = Field(30, ge=0, description="Time above the target before a replica is added.")
    downscale_delay_s: float = Field(
        1800, ge=0, description="Quiet time before a replica goes, and its states with it."
    )
    warm_states_s: float = Field(
        600,
        ge=0,
        description="Autoscaling adds a replica when states have to go that were asked for within so many seconds.",
    )
    max_gpu_memory_share: float = Field(
        0.95, gt=0, le=1, description="Share of a GPU's memory in use about which autoscaling lets no replica go."
    )
    cache_bytes: int = Field(
        256 << 20,
        ge=0,
        description="Budget of a replica's user states on its device, in bytes; room for the states of one batch stands beside it: "
        "about 100 of the largest. /v1/stats tells what is allocated.",
    )
    host_cache_bytes: int = Field(
        0,
        ge=0,
        description="Budget of the states that had to leave the device and wait in host memory, in bytes; allocated at the start, "
        "with room beside it, some 40 of the largest, so that states of all sizes fill it. /v1/stats tells what is allocated.",
    )
    state_dump: str | None = Field(
        None,
        description="Folder, local or s3://, of this service alone, where replicas leave their states and the events sent to "
        "them when they stop, and from which they fill their host memory; null: they start empty, and what was sent is lost. "
        "A local one must be seen by every node.",
    )
    state_dump_s: float = Field(
        30, gt=0, description="Longest time that a stopping replica takes to dump events and states, the hottest first."
    )
    warm_users: int = Field(
        0,
        ge=0,
        description="Most active users of the table whose states each replica encodes in the background once it runs, of those "
        "who are its own, as long as there is free room in its budgets.",
    )
    state_precision: Precision = Field(
        "float32",
        description="What states are kept in: float32, bf16, int8 or fp8 (on a GPU of compute capability 8.9 on); there all but "
        "the first compute in bf16.",
    )
    max_candidates: int = Field(2_000, ge=1, description="Most candidates of one request.")
    max_users: int = Field(100, ge=1, description="Most requests of one call to /v1/score:batch.")
    max_events: int = Field(200, ge=1, description="Most events of one user in a call.")
    max_user_events: int = Field(
        1_000, ge=1, description="Events kept of one user beside the table; past it, those that came first go first."
    )
    events_keep_s: float = Field(
        172_800, gt=0, description="Seconds that events are kept: longer than the table takes to catch up."
    )
    events_bytes: int = Field(
        128 << 20, ge=0, description="Budget of a replica's online events, in bytes, about 9 kB a user."
    )
    max_body_bytes: int = Field(1 << 20, ge=1, description="Largest body of a request, in bytes.")
    max_batch_requests: int = Field(16, ge=1, description="Requests scored together.")
    usual_candidates: int = Field(
        500,
        ge=1,
        description="Candidates of a usual request: a replica is ready when batches of such requests are no longer new to it.",
    )
    max_queued_requests: int = Field(
        256, ge=1, description="Requests that an HTTP proxy lets wait for replicas; more are answered 503 at once."
    )
    direct_host: str | None = Field(
        None,
        description="IP address, on every node with replicas, at which each replica listens too, on a port of its own, for clients "
        "that send a user's calls straight to hers (`longer.client`): 0.0.0.0, or 127.0.0.1 on a machine alone; null: all calls go "
        "through Serve's proxy.",
    )
    direct_ports: tuple[int, int] | None = Field(
        None,
        description="First and last port that replicas on a node may listen at, one each; null: any that is free.",
    )
    timeout_s: float = Field(
        10, gt=0, description="Longest time a request may take; a caller may ask for a shorter one."
    )
    table_silence_s: float = Field(
        2.0,
        gt=0,
        description="Silence of a sequence table on S3 after which it is asked once more, and then given up: requests that must "
        "be read then are answered 503; others do not wait for them.",
    )
    token_file: str | None = Field(
        None,
        description="File whose content every call must bring as bearer token; null: the variable LONGER_SCORING_TOKEN of the "
        "replicas' environment, and no token if that is not set.",
    )
    requires_token: bool = Field(
        False,
        description="A replica that finds no token does not start; so it is too where the app was built with one.",
    )
    access_log: bool = Field(
        True,
        description="A line of JSON a call, in access_REPLICA.jsonl among Serve's logs: times and sizes, no ids and no tokens.",
    )
    refresh_s: float = Field(60, gt=0, description="Seconds between looks for a newer version of the sequence table.")
    num_cpus: float = Field(1, ge=0, description="CPUs that Ray reserves for a replica.")
    num_gpus: float = Field(0, ge=0, description="GPUs of a replica; 0 scores on the CPU.")
    torch_threads: int = Field(1, ge=1, description="Threads of one torch operation.")
    pool_label: str | None = Field(
        None, description="Label whose value, 'gpu' or 'cpu', says which nodes are for these replicas; null: any."
    )

    @model_validator(mode="after")
    def _replicas_fit(self) -> Self:
        if self.num_replicas > self.max_replicas:
            raise ValueError(
                f"num_replicas={self.num_replicas} exceeds max_replicas={self.max_replicas}: raise the latter"
            )
        if self.state_dump and not self.host_cache_bytes:
            raise ValueError(f"state_dump={self.state_dump} is read into host memory: set host_cache_bytes too")
        if self.max_events > self.max_user_events:
            raise ValueError(f"max_events={self.max_events} exceeds max_user_events={self.max_user_events}: lower it")
        if self.direct_ports and not 0 < self.direct_ports[0] <= self.direct_ports[1] < 1 << 16:
            raise ValueError(f"direct_ports={self.direct_ports}: expected a first and a last port, from 1 to 65535")
        return self

    @property
    def max_ongoing_requests(self) -> int:
        """Of a replica: what Serve sends it at a time."""
        return 4 * self.max_batch_requests

    @property
    def stop_within_s(self) -> float:
        """What Serve gives a replica to end: for the requests that it has from Serve, then those from elsewhere, then its dump."""
        direct_s = self.timeout_s if self.direct_host else 0
        return self.timeout_s + direct_s + _DRAIN_MARGIN_S + (self.state_dump_s if self.state_dump else 0)

    @property
    def limits(self) -> Limits:
        return Limits(self.max_candidates, self.max_events, self.max_users)

    @property
    def event_limits(self) -> EventLimits:
        return EventLimits(self.max_user_events, self.events_keep_s, self.events_bytes)

    def token(self) -> str | None:
        """The bearer token, None if none is asked for; a UserError if it is required, or has a file, and is not there."""
        if self.token_file is None:
            token = os.environ.get(TOKEN_VARIABLE) or None
            if token is None and self.requires_token:
                raise UserError(
                    f"{TOKEN_VARIABLE}: not set where this replica runs, and the service must not be open: set it on every "
                    "node or in the application's runtime_env, or use token_file"
                )
            return token
        try:
            token = read_bytes(self.token_file).decode().strip()
        except (OSError, UnicodeDecodeError):
            raise UserError(f"token_file={self.token_file}: cannot be read as text: write the token there") from None
        if not token:
            raise UserError(f"token_file={self.token_file}: empty: write the token there")
        return token


class Rollout(BaseModel):
    """The deployment's `user_config`: what running replicas go over to, without a restart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str = Field(
        description="A checkpoint of the same event_schema; not the checkpoints table, which moves on."
    )


def resolved(args: ScoringArgs) -> ScoringArgs:
    """The arguments with every path found and checked: a mistake is told at once, before any replica starts.

    Without the catalogue, candidates given by id would silently lose their features and get other scores.
    """
    served = Table(args.checkpoint).current()
    checkpoint = served.path if served else args.checkpoint
    info = load_model(checkpoint)[1]
    root = args.checkpoint.rstrip("/").rpartition("checkpoints")[0] or "./"
    sequences = args.sequences or f"{root}tables/sequences"
    items = (args.items or f"{root}tables/items") if info.schema.features_of("item") else None
    version = open_version(sequences, info.schema, args.sequences_version, "jobs.build_sequences")
    if items:
        open_version(items, info.schema, items_version(version.id, info.schema), "jobs.build_sequences")
    check_kept(version, info.model.windows)
    if args.state_dump:
        filesystem(args.state_dump)
    found = {"checkpoint": checkpoint, "sequences": sequences, "items": items}
    return args.model_copy(update={**found, "requires_token": args.token() is not None})
