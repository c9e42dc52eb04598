"""What requests will need once, done before they come: kernels are compiled, and shapes of batches captured. No state is kept."""

from itertools import pairwise

import numpy as np
import pyarrow as pa

from longer.arrays import NO_EVENT_TS, Candidates, Histories, power_of_two
from longer.model.captured_growth import rooms_for_events
from longer.model.engine import StateEngine
from longer.model.states import rows_for
from longer.schema import EventSchema
from longer.serving.history import HistorySource, UserHistory
from longer.serving.store import StateStore


def warm_up(
    engine: StateEngine, store: StateStore, history: HistorySource, num_requests: int, num_candidates: int
) -> None:
    """Users are encoded, appended to and asked by `num_requests` requests of `num_candidates` each.

    As many users as requests, where growth has another size for so many; one, where it has not. Histories have every length that
    growth has a room for; appends are many events or one, inside a stride, and one over its end into another slot, of all users and
    of one among others.
    """
    model, num_users = engine.model, num_requests if power_of_two(num_requests) == num_requests else 1
    windows = model.windows
    moving = windows.max_history_events - windows.merge_size  # the event that opens the group which moves the windows
    ends = [min(model.settings.history_events, moving - 1), moving - 1, moving, moving + 1]
    known = _user(history, model.schema, ends[-1])

    def events(begin: int, end: int) -> Histories:
        return Histories.concatenate([known.events(begin, end)] * num_users)

    try:
        rows = [rows_for(store.layout, np.full(num_users, end)) for end in ends]
        slots, others = store.slots(rows[2]), store.slots(rows[3])
        for room in rooms_for_events(store.layout, num_users):
            engine.encode(events(0, min(room // num_users, ends[2])), slots)
        before = states = engine.encode(events(0, ends[0]), slots)
        for (begin, end), into in zip(pairwise(ends), (slots, slots, others), strict=True):
            before, states = states, engine.append(states, events(begin, end), into)
        if num_users > 1:
            one = [known.events(*ends[2:])] + [known.events(ends[2], ends[2])] * (num_users - 1)
            engine.append(before, Histories.concatenate(one), [others[0], *slots[1:]])
        asked = [states[r % num_users] for r in range(num_requests)]
        offsets = np.arange(num_requests + 1) * num_candidates
        engine.score(asked, np.full(num_requests, ends[-1]), _candidates(model.schema, offsets))
    finally:
        store.release()


def _user(history: HistorySource, schema: EventSchema, num_events: int) -> UserHistory:
    """One with so many events, one a millisecond, of which nothing else is known."""
    own = {"user_id": pa.array(["0"]).cast(schema.id_types[0]), "event_ts": pa.array(np.arange(num_events))}
    columns = [
        pa.repeat(own["user_id"][0], num_events)
        if field.name == "user_id"
        else own["event_ts"].cast(field.type)
        if field.name == "event_ts"
        else pa.nulls(num_events, field.type)
        for field in schema.events_arrow()
    ]
    events = pa.table(columns, schema.events_arrow())
    [whole] = history.tails(own["user_id"], events, np.zeros(1, np.int64), np.array([NO_EVENT_TS]))
    return whole


def _candidates(schema: EventSchema, offsets_R1: np.ndarray) -> Candidates:
    num_candidates = offsets_R1[-1]
    keys = {name: np.ones(num_candidates, np.int64) for name in ("item_id", *schema.of_candidates("categorical"))}
    numbers = {name: np.zeros(num_candidates, np.float32) for name in schema.of_candidates("numeric")}
    return Candidates(offsets_R1, keys | numbers)
