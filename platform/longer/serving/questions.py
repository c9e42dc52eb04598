"""What is asked offline, and how much of it is computed at once.

B users, R requests, C candidates in all of them, P packs.
"""

from dataclasses import dataclass

import numpy as np

from longer.arrays import Candidates, Histories, Int64, offsets_of, ranges
from longer.model.fuse import computed_in
from longer.model.ranker import Ranker

_NUMBERS_PER_TOKEN = 24
"""Numbers of the token's width that a layer holds at once: the token, its projections, the feed-forward layer's four."""

_FLOATS_PER_EVENT = 16
"""The same for an event's width, in the transformer inside a group."""

_COPIES_READ = 4
"""Of the widest step in which a candidate reads a history: what goes in, what comes out, and what is made on the way."""


@dataclass(frozen=True)
class Questions:
    """R requests of B users, each about its user's events before `history_end_R`; every history reaches back far enough."""

    histories: Histories
    row_R: Int64
    history_end_R: Int64
    request_ts_R: Int64

    def __len__(self) -> int:
        return len(self.row_R)

    def take(self, requests_N: Int64) -> "Questions":
        """The same histories with requests `requests_N` only, in that order."""
        columns = (self.row_R, self.history_end_R, self.request_ts_R)
        return Questions(self.histories, *(column[requests_N] for column in columns))


def candidates_of(candidates: Candidates, requests_N: Int64) -> tuple[Int64, Candidates]:
    """Numbers of the candidates of requests `requests_N`, in that order, and those candidates."""
    offsets, picked_C = ranges(candidates.offsets_R1[requests_N], candidates.offsets_R1[requests_N + 1])
    return picked_C, Candidates(offsets, {name: values[picked_C] for name, values in candidates.features.items()})


@dataclass(frozen=True)
class Budget:
    """How much is computed at once, from the bytes that it may take and from the model's sizes."""

    model: Ranker
    num_bytes: int

    @property
    def token_bytes(self) -> int:
        """What a token takes that is kept for one layer only, in the type that is computed in now."""
        return _NUMBERS_PER_TOKEN * self.model.settings.width * computed_in(self.model.norm_head.weight).itemsize

    def user_bytes(self, num_events_B: Int64, num_asked_B: Int64) -> Int64:
        """What a user's context takes while it is made: keys and values of every layer, and the events' activations.

        And the tails of `num_asked_B` requests, which are asked together.
        """
        sizes = self.model.settings
        num_kept_B = self._num_queries + self._num_tail(num_asked_B)
        kept = 2 * sizes.num_self_layers + _NUMBERS_PER_TOKEN
        return self._encoding_bytes(num_events_B) + 4 * kept * sizes.width * num_kept_B

    def pack_bytes(self, num_events_P: Int64, num_requests_P: Int64, num_candidates_P: Int64) -> Int64:
        """What a pack takes where a history, its requests and all of their candidates are one pass."""
        num_tokens_P = self._num_queries + self._num_tail(num_requests_P) + num_candidates_P
        return self._encoding_bytes(num_events_P) + self.token_bytes * num_tokens_P

    def read_bytes(self, num_events: int) -> int:
        """What a candidate takes, besides its token, where it reads so many events without a user's state."""
        return 4 * _COPIES_READ * self.model.cells_per_candidate(num_events)

    def pack_tokens(self, read_bytes: int = 0) -> int:
        """Of candidates and requests, half as many as a pack may have, which leaves the other half of the bytes to its history."""
        return max(1, self.num_bytes // 4 // (self.token_bytes + read_bytes))

    @property
    def _num_queries(self) -> int:
        return self.model.windows.query_groups + self.model.windows.stride_groups

    def _num_tail(self, num_requests: Int64) -> Int64:
        return num_requests * (self.model.embedding.num_globals + 1)

    def _encoding_bytes(self, num_events_B: Int64) -> Int64:
        """Of events, and of their groups in the first layer."""
        sizes, num_groups_B = self.model.settings, num_events_B // self.model.windows.merge_size + 1
        return 4 * (4 * num_groups_B * sizes.width + _FLOATS_PER_EVENT * sizes.event_width * num_events_B)

    def users(self, num_events_B: Int64, num_asked_B: Int64) -> list[Int64]:
        """Users of similar length in batches, each in half of the bytes with what it takes to pad them, or one user alone."""
        by_length = np.argsort(num_events_B, kind="stable")
        padded_B = self._padded_bytes(num_events_B)[by_length]
        beside_B = self.user_bytes(num_events_B, num_asked_B)[by_length] - padded_B
        beside_B1 = offsets_of(beside_B).tolist()
        starts = [0]
        for end, padded in enumerate(padded_B.tolist(), 1):  # of the longest so far, for each
            num_bytes = (end - starts[-1]) * padded + beside_B1[end] - beside_B1[starts[-1]]
            if num_bytes > self.num_bytes // 2 and end - starts[-1] > 1:
                starts.append(end - 1)
        return np.split(by_length, starts[1:])

    def _padded_bytes(self, num_events_B: Int64) -> Int64:
        """What every user of a batch takes as the one with the longest history does: groups in the first layer, and the index that
        interactions are counted with, its pairs three times while they are sorted."""
        model = self.model
        index_bytes = 8 * (3 * len(model.interaction_fields) + 1) if model.settings.interactions else 0
        num_groups_B = num_events_B // model.windows.merge_size + 1
        return 4 * 4 * num_groups_B * model.settings.width + index_bytes * num_events_B

    @property
    def most_users(self) -> int:
        """With full windows and a request each, in half of the bytes, or one."""
        [one] = self.user_bytes(np.array([self.model.windows.max_history_events]), np.ones(1, np.int64))
        return max(1, self.num_bytes // 2 // int(one))

    def candidates(self, num_groups: int) -> int:
        """Candidates in the other half. A CPU keeps copies of their tails and their attention weights over every group."""
        sizes = self.model.settings
        copies = 4 * (sizes.num_cls_tokens + 3) * sizes.width + (4 * sizes.num_heads + 2) * num_groups
        if self.model.norm_head.weight.is_cuda:
            copies = 0
        return max(1, self.num_bytes // 2 // (self.token_bytes + 4 * copies))
