"""A fingerprint tells events that changed from events that only came together differently."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.arrays import Histories
from longer.serving.fingerprint import EventPrint, event_marks
from tests.model.generate import random_histories

STRIDE = 6


def cut(events: Histories, begin: int, end: int) -> Histories:
    return events.slice_events(np.array([0]), np.array([begin]), np.array([end]))


def print_of(events: Histories) -> EventPrint:
    return EventPrint.from_start(int(events.first_index_B[0])).followed_by(event_marks(events), STRIDE)


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(0, 60), data=st.data())
@settings(max_examples=100, deadline=None)
def test_events_that_came_in_pieces_and_slid_have_the_print_of_the_whole(
    seed: int, length: int, data: st.DataObject
) -> None:
    events = random_histories(np.random.default_rng(seed), [length])
    begin = STRIDE * data.draw(st.integers(0, length // STRIDE))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=5)))
    grown = print_of(cut(events, 0, 0))
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        grown = grown.followed_by(event_marks(cut(events, start, end)), STRIDE)
        kept = STRIDE * (min(begin, end) // STRIDE)
        grown = grown.from_index(max(grown.first_index, kept), STRIDE)
    whole = cut(events, begin, length)
    assert (grown.first_index, grown.end_index) == (begin, length)
    assert grown.value == print_of(whole).value
    assert grown.agrees_with(whole)


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 60), data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_change_of_an_event_its_place_or_its_gap_is_seen(seed: int, length: int, data: st.DataObject) -> None:
    events = random_histories(np.random.default_rng(seed), [length])
    known, at = print_of(events), data.draw(st.integers(0, length - 1))

    def changed(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[at] += 1
        return values

    others = [replace(events, features={**events.features, name: changed(x)}) for name, x in events.features.items()]
    others.append(replace(events, event_ts_E=changed(events.event_ts_E)))
    others.append(replace(events, prev_event_ts_B=events.prev_event_ts_B + 1))
    others.append(replace(events, first_index_B=events.first_index_B + STRIDE))
    others.append(cut(events, 0, length - 1))
    assert not any(known.agrees_with(other) for other in others)


@given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_marks_of_users_together_are_those_of_each_alone(seed: int, lengths: list[int]) -> None:
    users = random_histories(np.random.default_rng(seed), lengths)
    alone = [event_marks(one) for one in users.split()]
    np.testing.assert_array_equal(event_marks(users), np.concatenate(alone))
