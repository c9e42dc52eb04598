"""What LONGER has to beat, on the same rows: how popular an item is, and how often the user had it.

E events of a bucket's users, C candidates, I items.
"""

from collections.abc import Sequence

import numpy as np

from longer.arrays import Histories, Int64


def count_in_history(
    histories: Histories, row_C: Int64, history_end_C: Int64, item_C: Int64, last_events: Sequence[int | None]
) -> list[Int64]:
    """For each n of `last_events`, how often each candidate's item is among the user's last n events before `history_end_C`.

    None counts the whole kept history. Indices are absolute; events that the table no longer keeps do not count.
    """
    lengths_B = np.diff(histories.offsets_B1)
    row_E = np.repeat(np.arange(len(histories)), lengths_B)
    index_E = np.arange(len(row_E)) - histories.offsets_B1[row_E] + histories.first_index_B[row_E]
    items, item_E = np.unique(histories.features["item_id"], return_inverse=True)
    pair_E = row_E * len(items) + item_E
    pairs, pair_E = np.unique(pair_E, return_inverse=True)
    span = np.int64(max(index_E.max(initial=0), history_end_C.max(initial=0)) + 1)
    place_E = np.sort(pair_E * span + index_E)  # pairs side by side, each in the order of events

    pair_C, known_C = _find(pairs, row_C * len(items) + _find(items, item_C)[0])
    known_C &= _find(items, item_C)[1]
    before_C = np.searchsorted(place_E, pair_C * span + history_end_C)
    counts = []
    for last in last_events:
        start_C = np.maximum(history_end_C - last, 0) if last is not None else np.zeros_like(history_end_C)
        counts.append(np.where(known_C, before_C - np.searchsorted(place_E, pair_C * span + start_C), 0))
    return counts


def item_counts(histories: Histories, before_ms: int) -> tuple[Int64, Int64]:
    """Items of events earlier than `before_ms`, ascending, and how many events each has."""
    return np.unique(histories.features["item_id"][histories.event_ts_E < before_ms], return_counts=True)


def popularity(parts: Sequence[tuple[Int64, Int64]], item_C: Int64) -> Int64:
    """Events of each candidate's item over all parts of `item_counts`."""
    items, place = np.unique(np.concatenate([items for items, _ in parts]), return_inverse=True)
    total_I = np.bincount(place, np.concatenate([counts for _, counts in parts])).astype(np.int64)
    place_C, known_C = _find(items, item_C)
    return np.where(known_C, total_I[place_C] if len(items) else 0, 0)


def _find(ascending: Int64, wanted: Int64) -> tuple[Int64, np.ndarray]:
    """Places of values in a sorted array (0 where absent), and which are there."""
    place = np.searchsorted(ascending, wanted)
    there = place < len(ascending)
    place = np.where(there, place, 0)
    if len(ascending):
        there &= ascending[place] == wanted
    return np.where(there, place, 0), there
