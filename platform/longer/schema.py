"""The three tables as Arrow schemas, and which of their columns are features.

events     one row an event, as users bring it          -> `EventSchema.events_arrow()`
sequences  one row a user, one list column a field      -> `EventSchema.sequences_arrow()`
requests   one row a request, one list column a field   -> `EventSchema.requests_arrow()`

A log of impressions has the columns of an event log with other features -> `EventSchema.of_impressions()`.
"""

import hashlib
import json
from typing import Literal, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

TIMESTAMP = pa.timestamp("ms", tz="UTC")
_RESERVED = {
    *("user_id", "item_id", "event_ts", "action", "dt", "bucket", "split", "request_id", "request_ts", "history_end"),
    *("first_index", "prev_event_ts", "num_events_total", "num_older", "reason", "line", "source_file"),
}


class Feature(BaseModel):
    """A side feature: a column of the event log, or of the log of impressions, that the model reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Column name, after mapping.")
    kind: Literal["categorical", "numeric"] = Field(
        description="Categorical values are hashed; numeric ones are floats."
    )
    of: Literal["item", "event", "request"] = Field(
        description="'item' features belong to the item and are known for candidates too; 'event' features only happen; 'request' "
        "features (device, page) are known when a request is scored: they are columns of a log of impressions, not of events."
    )

    @property
    def arrow_type(self) -> pa.DataType:
        return pa.string() if self.kind == "categorical" else pa.float32()


class EventSchema(BaseModel):
    """What an event is made of. Its hash is part of every table's manifest, of every checkpoint and of every user state."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: Literal["int64", "string"] = Field("int64", description="Type of user ids.")
    item_id: Literal["int64", "string"] = Field("int64", description="Type of item ids.")
    group_id: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9_]*$",
        description="Column of an int64 id shared by events of one request (a basket, a page view); not a feature. "
        "Without it, events of one user at one time are one request.",
    )
    features: tuple[Feature, ...] = Field((), description="Side features, in the order of their columns.")
    tasks: tuple[str, ...] = Field(("label",), min_length=1, description="Label columns of a request, one list each.")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [*(f.name for f in self.features), *self.tasks, *([self.group_id] if self.group_id else [])]
        for name in names:
            if names.count(name) > 1 or name in _RESERVED:
                raise ValueError(
                    f"column name '{name}' is used twice or reserved: rename the feature, task or group_id"
                )
        return self

    def features_of(self, of: str, kind: str | None = None) -> tuple[str, ...]:
        """Names of the features of an 'item', an 'event' (its item's are not repeated) or a 'request', of one kind or both."""
        return tuple(f.name for f in self.features if f.of == of and kind in (None, f.kind))

    def of_history(self, kind: str) -> tuple[str, ...]:
        """Names of the features of one kind that a history's events have, their items' included; the settings' order is kept."""
        return tuple(f.name for f in self.features if f.of != "request" and f.kind == kind)

    def of_candidates(self, kind: str) -> tuple[str, ...]:
        """Names of the features of one kind that a candidate has: its item's, then its request's."""
        return self.features_of("item", kind) + self.features_of("request", kind)

    def of_impressions(self, group_id: str | None) -> "EventSchema":
        """The schema of a log of impressions, one row an item shown: features of items and of requests, and the labels.

        An impression has the time of its request as `event_ts`; `group_id` is the column of its request's id, if it has one.
        """
        shown = [f.model_copy(update={"of": "event"}) for f in self.features if f.of == "request"]
        labels = [Feature(name=task, kind="numeric", of="event") for task in self.tasks]
        features = [f for f in self.features if f.of == "item"] + shown + labels
        no_task = ("*",)  # nothing is learned from it but through requests
        return EventSchema(
            user_id=self.user_id, item_id=self.item_id, group_id=group_id, features=tuple(features), tasks=no_task
        )

    @property
    def id_types(self) -> tuple[pa.DataType, pa.DataType]:
        """Arrow types of user ids and item ids."""
        return getattr(pa, self.user_id)(), getattr(pa, self.item_id)()

    def event_fields(self) -> list[pa.Field]:
        """The fields of one event but for its user, in canonical order; ties in time are ordered by the rest, in this order."""
        group = [pa.field(self.group_id, pa.int64())] if self.group_id else []
        return [
            pa.field("event_ts", TIMESTAMP),
            *group,
            pa.field("item_id", self.id_types[1]),
            pa.field("action", pa.string()),
            *(pa.field(f.name, f.arrow_type) for f in self.features if f.of != "request"),
        ]

    def events_arrow(self) -> pa.Schema:
        return pa.schema([pa.field("user_id", self.id_types[0]), *self.event_fields()])

    def sequences_arrow(self) -> pa.Schema:
        """One row a user; list columns oldest to newest. `prev_event_ts` is the time of the event just before the first kept."""
        return pa.schema(
            [
                pa.field("user_id", self.id_types[0]),
                pa.field("first_index", pa.int64()),
                pa.field("prev_event_ts", TIMESTAMP),
                pa.field("num_events_total", pa.int64()),
                *(pa.field(field.name, pa.list_(field.type)) for field in self.event_fields()),
            ]
        )

    def requests_arrow(self) -> pa.Schema:
        """One row a request; the history is the user's events before absolute index `history_end`."""
        return pa.schema(
            [
                pa.field("request_id", pa.int64()),
                pa.field("user_id", self.id_types[0]),
                pa.field("request_ts", TIMESTAMP),
                pa.field("history_end", pa.int64()),
                pa.field("item_id", pa.list_(self.id_types[1])),
                *(pa.field(f.name, f.arrow_type) for f in self.features if f.of == "request"),
                *(pa.field(f.name, pa.list_(f.arrow_type)) for f in self.features if f.of == "item"),
                *(pa.field(task, pa.list_(pa.float32())) for task in self.tasks),
            ]
        )

    def hash(self) -> str:
        """Sixteen hex digits that change whenever any column, type or role does."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
