"""A user's history is the one that the table would hold had an increment brought the events sent online."""

from collections import Counter
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longer.arrays import Histories
from longer.data.tables import SequenceTable
from longer.serving.history import HistorySource, UserHistory
from tests.data.tables import publish_sequences
from tests.serving.tables import tiny_settings
from tests.serving.test_online import HOUR_MS, KEEP, START_MS, Event, event, in_order, log_of


def events_between(first_hour: int, last_hour: int) -> st.SearchStrategy[list[Event]]:
    """Up to 30, as often many as few: KEEP cuts from 24 on."""
    one = st.builds(event, st.integers(first_hour, last_hour), st.integers(0, 2))
    return st.integers(0, 30).flatmap(lambda num: st.lists(one, min_size=num, max_size=num))


EVENTS, YOUNGER = events_between(0, 30), events_between(31, 60)


def all_of(history: UserHistory) -> Histories:
    return history.events(history.first_index, history.end_index)


def assert_equal(found: Histories, wanted: Histories) -> None:
    for field in fields(Histories):
        ours, theirs = getattr(found, field.name), getattr(wanted, field.name)
        pairs = [(ours[name], theirs[name]) for name in theirs] if field.name == "features" else [(ours, theirs)]
        for one, other in pairs:
            np.testing.assert_array_equal(one, other, err_msg=field.name)


def younger_than_the_cut(table: list[Event], online: list[Event]) -> Counter[Event]:
    num_cut = int(KEEP.first_index(np.array([len(table)]))[0])
    until = in_order(Counter(table))[num_cut - 1][0] if num_cut else START_MS - HOUR_MS
    return Counter(one for one in online if one[0] > until)


@settings(max_examples=30, deadline=None)
@given(users=st.lists(st.tuples(EVENTS, st.one_of(EVENTS, YOUNGER, st.just([]))), min_size=1, max_size=5))
def test_users_together_whose_events_are_younger_tie_or_come_late_have_the_rows_of_a_build_of_all(
    tmp_path_factory: pytest.TempPathFactory, users: list[tuple[list[Event], list[Event]]]
) -> None:
    root = tmp_path_factory.mktemp("history")
    schema = tiny_settings(root).event_schema
    nobody = {99: Counter([event(0, 0)])}  # so that no table is empty
    tables = {user: Counter(table) for user, (table, _) in enumerate(users)}
    online = {user: Counter(sent) for user, (_, sent) in enumerate(users)}
    counted = {user: tables[user] | younger_than_the_cut(*both) for user, both in enumerate(users)}
    publish_sequences(f"{root}/before", log_of(tables | nobody, schema), schema, KEEP, 3, 20)
    publish_sequences(f"{root}/after", log_of(counted | nobody, schema), schema, KEEP, 3, 20)
    ids = pa.array(range(len(users)))
    source = HistorySource(f"{root}/before", schema)
    sent = log_of(online | nobody, schema)
    sent = sent.filter(pa.compute.less(sent["user_id"], 99))
    found = source.with_online([ids[n : n + 1] for n in range(len(ids))], source.read(ids), sent)
    for user, wanted in enumerate(SequenceTable(f"{root}/after", schema).get(ids).split()):
        assert_equal(all_of(found[user]), wanted)
