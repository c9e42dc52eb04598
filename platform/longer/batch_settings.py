"""Settings of the jobs that score offline: what is asked of whom, and on how many actors."""

from typing import Literal, Self

from pydantic import AwareDatetime, Field, PositiveInt, model_validator

from longer.section import Section, WorkersPath


class ScorerPool(Section):
    """The actors that hold the model; each takes one bucket of users after the other."""

    concurrency: tuple[PositiveInt, PositiveInt] = Field(
        (2, 2),
        description="Fewest and most actors, each with its own copy of the model; more start while buckets wait.",
    )
    num_gpus_per_scorer: float = Field(
        0.0, ge=0, description="GPUs of each actor: one, or a part of one that others share; 0 scores on a CPU."
    )
    batch_bytes: int = Field(
        256 << 20,
        ge=1 << 20,
        description="Memory of an actor for what the model computes at once: users' contexts, blocks of candidates, and the "
        "check beside them. "
        "Gigabytes on a GPU.",
    )

    @model_validator(mode="after")
    def _pool_can_start(self) -> Self:
        fewest, most = self.concurrency
        if fewest > most:
            raise ValueError(f"concurrency={self.concurrency}: the fewest actors are more than the most: swap them")
        if self.num_gpus_per_scorer > 1:
            raise ValueError(
                f"num_gpus_per_scorer={self.num_gpus_per_scorer}: an actor uses one GPU, or a part of one: "
                "for more GPUs, raise concurrency"
            )
        return self

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus_per_scorer else "cpu"


class UserSettings(ScorerPool):
    """Which users, and as of when."""

    users: WorkersPath | None = Field(
        None,
        description="Parquet file, or folder of such, whose column user_id names users; one named twice counts once. "
        "null: all users of the sequence table.",
    )
    request_ts: AwareDatetime | None = Field(
        None,
        description="The moment of which all users are asked, with a time zone: each history is the events strictly before it. "
        "A part of a millisecond counts as a whole one. "
        "null: one millisecond after the sequence table's watermark, so after every event.",
    )

    check_requests: int = Field(
        4, ge=1, description="Requests or users of each bucket that the serving path answers too, to compare."
    )


class BatchSettings(UserSettings):
    """Offline scoring: a requests table, or users times candidates, or users' best items of the catalogue."""

    precision: Literal["float32", "bf16"] = Field(
        "float32",
        description="What matrices are multiplied in. bf16, on GPUs only, is faster; its scores differ from those in float32 "
        "by up to 0.04 in log-odds, 4 % of a small probability, and more where log-odds are beyond 4 or wide apart; values of "
        "a regression by a hundredth of their size.",
    )
    requests_table: WorkersPath | None = Field(
        None,
        description="Folder or s3:// prefix of a requests table to score, or of one of its versions, as jobs.build_requests "
        "publishes it, made from a version of the root's sequence table. null: the root's own, if no items are named here.",
    )
    split: str = Field("test", description="Split of the requests table to score, or 'all' of them.")
    candidates: WorkersPath | None = Field(
        None,
        description="Parquet file, or folder of such, whose column item_id names the items that every user is asked about.",
    )
    catalogue: bool = Field(
        False,
        description="Ask every user about all items of the catalogue; needs top_k. The catalogue is all that the sequence table "
        "has seen: with a request_ts in the past, items first seen after it are scored too.",
    )
    top_k: int | None = Field(
        None, ge=1, description="Keep each user's best items only, by the first task; null keeps all scores."
    )

    @model_validator(mode="after")
    def _bf16_on_gpus(self) -> Self:
        if self.precision == "bf16" and not self.num_gpus_per_scorer:
            raise ValueError("precision=bf16 is for GPUs: set num_gpus_per_scorer, or leave float32")
        return self

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        if self.candidates and self.catalogue:
            raise ValueError("candidates and catalogue both say what the users are asked about: drop one")
        if self.catalogue and self.top_k is None:
            raise ValueError("catalogue without top_k would write every score of every item: set top_k")
        if self.of_users and self.requests_table:
            raise ValueError(
                "requests_table has requests with items of their own: drop it, or candidates and catalogue"
            )
        if not self.of_users:
            for name in ("users", "request_ts", "top_k"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for users' scores: add candidates or catalogue, or drop it")
        return self

    @property
    def of_users(self) -> bool:
        """Whether users are asked about named items, rather than a requests table scored."""
        return self.catalogue or self.candidates is not None


class ExportSettings(UserSettings):
    """Users' vectors."""
