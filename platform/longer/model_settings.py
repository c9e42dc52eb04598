"""Settings of the model."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from longer.encoder_settings import EncoderSettings, LongerEncoder
from longer.section import Section
from longer.windows import WindowRule


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
    num_self_layers: int = Field(2, ge=0, description="N: LONGER's self-causal layers after the cross-causal one.")
    inner_transformer: bool = Field(
        True, description="InnerTrans: a transformer block inside each group before merging."
    )
    num_cls_tokens: int = Field(2, ge=0, description="Learned global tokens, besides the user's own.")
    num_user_tokens: int = Field(
        1, ge=0, description="Global tokens that are the user's own; 0: the model knows users by their events only."
    )
    feed_forward_ratio: int = Field(4, ge=1, description="Width of the feed-forward layer over the token's.")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout probability on attention and feed-forward outputs: of longer, transformer, hstu and user_tower. With "
        "user_embedding, that which its tower was trained with, and none any more.",
    )
    item_rows: int = Field(131_072, ge=2, description="Rows of the hashed item embedding table.")
    user_rows: int = Field(16_384, ge=2, description="Rows of the hashed user embedding table.")
    categorical_rows: int = Field(
        4_096,
        ge=2,
        le=1 << 16,
        description="Rows of each hashed side-feature table. At most 65,536: a training step passes over all of them, unlike those "
        "of items and users, of which it touches what it read.",
    )
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

    @model_validator(mode="after")
    def _encoder_has_what_is_switched(self) -> Self:
        for name, only in (("encoding", "appendable"), ("queries", "recent")):
            if self.encoder.kind != "longer" and getattr(self, name) != only:
                raise ValueError(
                    f"{name}={getattr(self, name)}: encoder {self.encoder.kind} has no such switch: leave {name} out "
                    "or set encoder.kind to longer"
                )
        if self.dropout and self.encoder.kind in ("none", "sum_pooling", "din", "sim", "twin"):
            raise ValueError(
                f"dropout={self.dropout:g}: encoder {self.encoder.kind} has no layer that drops out: leave dropout out or set "
                "encoder.kind to longer, transformer, hstu or user_tower"
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
