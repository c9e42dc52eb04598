"""The arithmetic of a plan: from what is asked for and the measured constants to bytes, cores, GPUs, dollars and time."""

import math
from functools import cache
from typing import Annotated

import numpy as np
from pydantic import Field

from benchmarks.capacity.measured import BUILD_CORES, BUILD_EVENTS, SCORE_CANDIDATES, SCORE_REQUESTS, Measured
from benchmarks.model_arms.sizes import SCHEMA, TASKS
from longer.config import Section
from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.state_layout import Precision, StateLayout
from longer.model.states import rows_for
from longer.model_settings import ModelSettings
from longer.serving.room import device_bytes_for, entry_bytes
from longer.table_settings import SequenceSettings

MODEL = ModelSettings(
    history_events=10_000,
    merge_size=8,
    event_width=32,
    query_groups=100,
    stride_groups=50,
    num_heads=4,
    num_self_layers=3,
    item_rows=2_000_000,
    user_rows=100_000,
)
"""The sizes at which the GPU figures were measured."""
DAYS_A_MONTH = 30


class Workload(Section):
    """What is asked for, and what is assumed. None of it is measured."""

    users: int = Field(1_000_000_000, ge=1, description="users")
    events_per_user: int = Field(10_000, ge=1, description="events of each user")
    requests_per_day: float = Field(10e9, gt=0, description="requests a day")
    candidates: int = Field(500, ge=1, description="candidates a request")
    history_days: int = Field(365, ge=1, description="days in which a user makes those events")
    training_days: int = Field(30, ge=1, description="days of requests that a model is first trained on")
    peak_over_mean: float = Field(2.0, ge=1, description="requests a second at the peak, over the day's mean")
    utilisation: float = Field(0.6, gt=0, le=1, description="share of a GPU's time planned for at the peak")
    hit_shares: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.5, 0.8, 0.95),
        min_length=1,
        description="shares of requests whose user's state is there; the middle one is priced",
    )
    state_gb_per_gpu: float = Field(60.0, gt=0, description="GB of an 80 GB GPU for states")
    cluster_cores: int = Field(1_000, ge=1, description="cores of the cluster that builds sequences")
    usd_per_core_hour: float = Field(0.05, ge=0, description="price of a core-hour, $: an example, put yours")
    usd_per_gpu_hour: float = Field(3.0, ge=0, description="price of a GPU-hour, $: an example, put yours")
    usd_per_gb_month: float = Field(
        0.02, ge=0, description="price of a GB stored for a month, $: an example, put yours"
    )


@cache
def state_layout(precision: Precision) -> StateLayout:
    """Of a model of these sizes; how many rows its tables have changes nothing, so that they have few here."""
    few_rows = {"item_rows": 2, "user_rows": 2, "categorical_rows": 2}
    return StateLayout.of(Longer(MODEL.model_copy(update=few_rows), SCHEMA, TASKS), precision)


def state_bytes(num_events: int, precision: Precision) -> int:
    """Of the slot that the store gives a user with `num_events` events, which is what its budget counts."""
    layout = state_layout(precision)
    [rows] = rows_for(layout, np.array([num_events])).tolist()
    return layout.row_bytes * next(size for size in StatePool.sizes_of(layout) if size >= rows)


class Plan:
    """The arithmetic of docs/scaling.md; every method is one of its formulas."""

    def __init__(self, asked: Workload, constants: Measured) -> None:
        self.asked, self.m = asked, constants
        self.events = asked.users * asked.events_per_user
        self.new_events = self.events / asked.history_days
        self.window_events = min(asked.events_per_user, MODEL.history_events)
        self.priced_hit = sorted(asked.hit_shares)[len(asked.hit_shares) // 2]
        self.peak_requests_per_s = asked.requests_per_day / 86_400 * asked.peak_over_mean

    # -- sequences ----------------------------------------------------------------------------------------------------

    def build_core_hours(self) -> float:
        return self.events / (self.m.build_events_per_s.value / BUILD_CORES) / 3600

    def increment_core_hours(self) -> float:
        return self.new_events / (self.m.increment_events_per_s.value / BUILD_CORES) / 3600

    def rewrite_core_hours(self) -> float:
        return self.build_core_hours() / (SequenceSettings().merge_share * self.asked.history_days)

    def log_bytes(self) -> float:
        return self.events * self.m.log_mb.value * 1e6 / BUILD_EVENTS

    def sequences_bytes(self) -> float:
        return self.events * self.m.sequences_mb.value * 1e6 / BUILD_EVENTS

    def core_bytes_per_s(self) -> float:
        return (self.log_bytes() + self.sequences_bytes()) / self.build_core_hours() / 3600

    def num_tables(self) -> int:
        blocks, buckets = self.m.block_events.value * self.m.most_blocks.value, self.m.bucket_events.value
        return math.ceil(self.events / min(blocks, buckets * self.m.most_buckets.value))

    # -- training -----------------------------------------------------------------------------------------------------

    def trained_events_per_s(self) -> float:
        return self.m.train_users.value * self.m.train_mean_events.value / (self.m.train_step_ms.value / 1e3)

    def encode_s(self) -> float:
        """Of one window, as its part of a training step, which does more than encode but shares its launches among many users."""
        return self.window_events / self.trained_events_per_s()

    def training_gpu_hours(self) -> float:
        """Of one day's requests."""
        return self.asked.requests_per_day * self.encode_s() / 3600

    # -- the online fleet ---------------------------------------------------------------------------------------------

    def score_s(self) -> float:
        return self.m.score_ms.value / 1e3 / SCORE_REQUESTS * self.asked.candidates / SCORE_CANDIDATES

    def graph_score_s(self) -> float:
        faster = self.m.score_ms.value - self.m.score_model_ms.value + self.m.score_graph_ms.value
        return self.score_s() * faster / self.m.score_ms.value

    def misses_per_s(self, hit: float) -> float:
        return self.peak_requests_per_s * (1 - hit)

    def gpu_s(self, hit: float) -> float:
        return self.score_s() + (1 - hit) * self.encode_s()

    def replicas(self, hit: float) -> int:
        return math.ceil(self.peak_requests_per_s * self.gpu_s(hit) / self.asked.utilisation)

    def served_gpu_s(self, hit: float) -> float:
        """By replicas' own steps, each of full windows; every state that is there has new events."""
        grown_ms = hit * self.m.served_append_ms.value + (1 - hit) * self.m.served_encode_ms.value
        score_ms = self.m.served_score_ms.value * self.asked.candidates / SCORE_CANDIDATES
        return (score_ms + grown_ms) / 1e3 / SCORE_REQUESTS

    def state_bytes(self, precision: Precision) -> int:
        return state_bytes(self.asked.events_per_user, precision)

    def most_state_bytes(self, precision: Precision) -> int:
        """Until the windows move."""
        later = range(self.asked.events_per_user, self.asked.events_per_user + MODEL.windows.stride_events)
        return max(state_bytes(num_events, precision) for num_events in later)

    def index_bytes(self) -> int:
        """What Python keeps of a state, as `StateStore.index_bytes` counts it."""
        return entry_bytes(SCHEMA, MODEL.windows)

    def states_per_gpu(self, precision: Precision) -> int:
        return int(self.asked.state_gb_per_gpu * 1e9 / self.state_bytes(precision))

    def reserved_bytes(self, precision: Precision) -> int:
        """Memory that `StateStore` takes for what is for states."""
        return device_bytes_for(state_layout(precision), round(self.asked.state_gb_per_gpu * 1e9))

    def fleet_states(self, hit: float) -> int:
        return min(self.replicas(hit) * self.states_per_gpu("bf16"), self.asked.users)

    def stay_s(self, hit: float) -> float:
        return self.fleet_states(hit) / self.misses_per_s(hit)

    def read_cores(self, hit: float) -> float:
        return self.misses_per_s(hit) * self.m.read_ms.value / 1e3

    def read_bytes_per_s(self, hit: float) -> float:
        return self.misses_per_s(hit) * self.m.read_bytes.value

    def fleet_usd_per_day(self, hit: float) -> float:
        asked = self.asked
        return 24 * (self.replicas(hit) * asked.usd_per_gpu_hour + self.read_cores(hit) * asked.usd_per_core_hour)

    def summary(self) -> dict[str, float]:
        hit = self.priced_hit
        return {
            "users": self.asked.users,
            "events": self.events,
            "sequences_bytes": self.sequences_bytes(),
            "build_core_hours": self.build_core_hours(),
            "increment_core_hours": self.increment_core_hours() + self.rewrite_core_hours(),
            "state_bytes": self.state_bytes("bf16"),
            "training_gpu_hours_per_day": self.training_gpu_hours(),
            "hit_share": hit,
            "replicas": self.replicas(hit),
        }
