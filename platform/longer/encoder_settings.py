"""Which encoder reads a history, and its own sizes: `model.encoder`, told apart by `kind`.

All of them read the same events, write one vector a candidate, and share the heads and the interaction features.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from longer.section import Section, WorkersPath


class LongerEncoder(Section):
    """LONGER itself (arXiv 2505.04421); its sizes are the model's."""

    kind: Literal["longer"] = "longer"


class NoEncoder(Section):
    """The history is not read: candidate, user, request and, if they are on, the interaction features alone."""

    kind: Literal["none"] = "none"


class SumPooling(Section):
    """The sum of the events, the same for every candidate."""

    kind: Literal["sum_pooling"] = "sum_pooling"


class Din(Section):
    """Deep Interest Network (arXiv 1706.06978): an activation unit weights each event for each candidate."""

    kind: Literal["din"] = "din"
    recent_events: PositiveInt | None = Field(None, description="Read the newest this many events only; null: all.")
    hidden_width: int = Field(36, ge=1, description="Hidden width of the activation unit.")


class Sim(Section):
    """Search-based Interest Model (arXiv 2006.05639): a search for the candidate's events, then attention over those."""

    kind: Literal["sim"] = "sim"
    search: Literal["hard", "soft"] = Field("hard", description="By equal feature, or by learned inner product.")
    field: str = Field("category", description="hard: the item's categorical feature that must be equal.")
    top_events: int = Field(100, ge=1, description="Events that the search keeps: the newest, or the most alike.")
    short_events: int = Field(50, ge=1, description="Newest events that the short-term branch reads.")


class Twin(Section):
    """Two-stage Interest Network (arXiv 2302.02352): one target attention both finds the events and weights them."""

    kind: Literal["twin"] = "twin"
    top_events: int = Field(100, ge=1, description="Events that the first stage keeps.")


class FullTransformer(Section):
    """A causal Transformer over every event, each candidate at its end: what LONGER compresses."""

    kind: Literal["transformer"] = "transformer"
    num_layers: int = Field(2, ge=1, description="Layers.")


class Hstu(Section):
    """Hierarchical Sequential Transduction Unit (arXiv 2402.17152): pointwise attention, which can count."""

    kind: Literal["hstu"] = "hstu"
    num_layers: int = Field(2, ge=1, description="Layers.")


class UserTower(Section):
    """A causal Transformer whose newest event stands for the user (arXiv 2205.04507); it meets a candidate in a product only."""

    kind: Literal["user_tower"] = "user_tower"
    num_layers: int = Field(2, ge=1, description="Layers.")


class UserEmbedding(Section):
    """The frozen vector of a user tower that was trained first, as one more input: what LONGER replaces."""

    kind: Literal["user_embedding"] = "user_embedding"
    num_layers: int = Field(2, ge=1, description="Layers of the upstream user tower.")
    upstream: WorkersPath | None = Field(
        None, description="Checkpoint folder of the trained user tower, local or s3://; needed to train, not to load."
    )


EncoderSettings = Annotated[
    LongerEncoder | NoEncoder | SumPooling | Din | Sim | Twin | FullTransformer | Hstu | UserTower | UserEmbedding,
    Field(discriminator="kind"),
]
