"""Settings of training and of evaluation."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from longer.section import Section

TaskKind = Literal["binary", "regression"]


class TaskSettings(Section):
    """One head."""

    name: str = Field("label", description="Label column of the requests table.")
    kind: TaskKind = Field("binary", description="Cross-entropy or squared error.")
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
        description="Compute each layer, and the events and groups before it, again for their gradients instead of keeping what "
        "they made: less memory, more time.",
    )
    validate_every_steps: int = Field(
        100, ge=1, description="Steps between validations, each with a checkpoint; an epoch ends with one, too."
    )
    max_validation_requests: int = Field(
        1_000, ge=1, description="Validation requests scored each time, spread evenly."
    )
    keep_checkpoints: int = Field(
        2,
        ge=1,
        description="Checkpoints of a run that are kept: the newest this many, and the best by validation of those that end an "
        "epoch.",
    )
    keep_runs: int = Field(
        3,
        ge=1,
        description="Published runs whose checkpoints are kept: of older ones only TensorBoard's scalars stay, once another is "
        "published. What was published stays, and so do runs that have published nothing yet.",
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
