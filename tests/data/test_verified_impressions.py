"""Of requests that are missing, those whose window the table has cut are told from those that were lost."""

import numpy as np
import pyarrow as pa

from longer.data.columns import list_columns
from longer.data.verified_impressions import is_cut_of
from longer.schema import TIMESTAMP
from longer.windows import WindowRule


def test_a_request_is_cut_by_its_own_users_events_strictly_before_it_and_by_no_others() -> None:
    """Of users with lists of any length, none too; at the very time of an event; of users who are not in this file."""
    windows, rng = WindowRule(2, 4, 2, 2), np.random.default_rng(0)
    own = [np.sort(rng.integers(0, 30, size)) for size in rng.integers(0, 25, 20)]
    first_index, user, time = rng.integers(0, 2, 20) * 8, rng.integers(0, 25, 600), rng.integers(0, 31, 600)
    offsets = np.cumsum([0, *map(len, own)])
    event_ts = pa.table({"event_ts": pa.array(np.concatenate(own)).cast(TIMESTAMP)})
    sequences = pa.table({"user_id": np.arange(20), "first_index": first_index, **list_columns(offsets, event_ts)})
    missing = pa.table({"user_id": user, "request_ts": pa.array(time).cast(TIMESTAMP)})
    expected = [
        u < 20 and windows.history_start(first_index[u] + int((own[u] < t).sum())) * windows.merge_size < first_index[u]
        for u, t in zip(user.tolist(), time.tolist(), strict=True)
    ]
    assert 0 < sum(expected) < sum(user < 20)
    assert is_cut_of(missing, sequences, windows).tolist() == expected
    assert is_cut_of(missing.slice(0, 0), sequences, windows).tolist() == []
