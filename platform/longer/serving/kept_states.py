"""User states as arrays that outlive the process: packed for a file, and taken out again. No Ray, no HTTP.

S states of one file, N rows of all their slots, E events of their partial groups.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from longer.arrays import Histories
from longer.model.states import UserState
from longer.serving.cache import Entry, Known
from longer.serving.fingerprint import EventPrint
from longer.serving.store import HeldState, StateEntry
from longer.slots import Slot

Arrays = dict[str, npt.NDArray]

_UNKNOWN_REVISION = -1
"""Of events sent to a replica that is gone: no revision here, so that what they left is checked against the table."""

_NUMBERS = (
    *("user_key", "first_index", "num_events", "last_event_ts", "query_first", "num_rows"),
    *("next_event_ts", "holds_table", "has_online", "knows_events", "table", "print_first", "print_end", "num_sums"),
    *("num_partial", "partial_first", "prev_event_ts", "is_protected"),
)
_NO_SLOT = Slot(0, 0, None)  # type: ignore[arg-type]  # a kept state has none until it is taken in


@dataclass(frozen=True)
class KeptState:
    """A state out of a file; its entry has no slot.

    `knows_events`: it was as the online events that are dumped with it say, of which there were some.
    """

    user_id: int | str
    user_key: int
    entry: StateEntry
    words_NI: torch.Tensor
    is_protected: bool
    knows_events: bool

    def entry_with(self, events_revision: int | None) -> StateEntry:
        """Its entry where the events dumped with it, and no others, have this revision; None where they are not what is held."""
        if not self.knows_events or events_revision is None:
            return self.entry
        return replace(self.entry, known=self.entry.known._replace(online_revision=events_revision))


def pack(
    states: Sequence[tuple[HeldState, bool, torch.Tensor]], tables: list[str], revision: Callable[[int], int]
) -> Arrays:
    """Arrays of states, whether each is protected, and their slots' words; `tables` gets the table versions that they name, and
    `revision` is that of a user's online events now."""
    rows, sums, partial = [], list[npt.NDArray](), Histories.concatenate([s[0].entry.state.partial for s in states])
    for held, is_protected, words_NI in states:
        entry, state, known = held.entry, held.entry.state, held.entry.known
        if known.table_version not in tables:
            tables.append(known.table_version)
        sums.append(np.append(entry.events.sums_S, entry.events.total))
        has_online = known.online_revision != 0
        knows_events = has_online and known.online_revision == revision(state.user_key)
        rows.append(
            [
                *(state.user_key, state.first_index, state.num_events, state.last_event_ts, state.query_first, len(words_NI)),
                *(entry.next_event_ts, entry.holds_table, has_online, knows_events, tables.index(known.table_version)),
                *(entry.events.first_index, entry.events.end_index, len(sums[-1])),
                *(len(state.partial.event_ts_E), state.partial.first_index_B[0], state.partial.prev_event_ts_B[0]),
                is_protected,
            ]
        )  # fmt: skip
    return {
        "numbers_SI": np.array(rows, np.int64),
        "sums": np.concatenate(sums).view(np.int64),
        "words_NI": torch.cat([words_NI for _, _, words_NI in states]).numpy(),
        "event_ts_E": partial.event_ts_E,
        **{f"event.{n:03d}.{name}": values for n, (name, values) in enumerate(partial.features.items())},
    }


def unpack(arrays: Arrays, user_ids: Sequence[int | str], tables: Sequence[str]) -> Iterator[KeptState]:
    """The states of a file, in its order."""
    numbers = {name: arrays["numbers_SI"][:, number] for number, name in enumerate(_NUMBERS)}
    ends = {name: np.cumsum(numbers[name]) for name in ("num_rows", "num_sums", "num_partial")}
    words_NI = torch.from_numpy(arrays["words_NI"])
    for s, user_id in enumerate(user_ids):
        of = {name: int(values[s]) for name, values in numbers.items()}
        rows, sums, events = (slice(int(end[s]) - of[name], int(end[s])) for name, end in ends.items())
        *sums_S, total = arrays["sums"].view(np.uint64)[sums]
        state = UserState(
            user_key=of["user_key"],
            first_index=of["first_index"],
            num_events=of["num_events"],
            last_event_ts=of["last_event_ts"],
            query_first=of["query_first"],
            partial=_partial(arrays, events, of),
            slot=_NO_SLOT,
        )
        entry = Entry(
            state,
            last_event_ts=of["last_event_ts"],
            next_event_ts=of["next_event_ts"],
            known=Known(tables[of["table"]], _UNKNOWN_REVISION if of["has_online"] else 0),
            events=EventPrint(of["print_first"], of["print_end"], np.array(sums_S, np.uint64), total),
            holds_table=bool(of["holds_table"]),
            user_id=user_id,
        )
        yield KeptState(
            user_id, of["user_key"], entry, words_NI[rows], bool(of["is_protected"]), bool(of["knows_events"])
        )


def _partial(arrays: Arrays, events: slice, of: dict[str, int]) -> Histories:
    return Histories(
        user_key_B=np.array([of["user_key"]]),
        offsets_B1=np.array([0, events.stop - events.start]),
        first_index_B=np.array([of["partial_first"]]),
        prev_event_ts_B=np.array([of["prev_event_ts"]]),
        event_ts_E=arrays["event_ts_E"][events],
        features={name.split(".", 2)[2]: arrays[name][events] for name in sorted(arrays) if name.startswith("event.")},
    ).copied()  # the file has other users' too
