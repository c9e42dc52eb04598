"""How often a store of states is hit, at budgets from 1% to 100% of all states: python -m benchmarks.hit_rate [--requests N]

Two logs replayed in order of time through the store that serving uses, with a model of random weights, on one device; each budget
once all on the device, and once a quarter of it there and the rest in host memory. A budget of 0% is no cache: each request encodes
its user's history once, for all its candidates.

    complete_journey   a grocery's customers: a request just before each basket, with 50 candidates
    generated          the synthetic log with its daily rhythm: a request before every tenth event

A request is asked about the user's events strictly before it, in batches of up to 16 users, as serving asks; most users did
something since their last one, so that a state which is there is appended to: a second page of the same visit would be a hit. The
first half of the replay fills the store and is not counted. A user without a state is encoded from memory, so that `load` has no
share of reading a table (`benchmarks.point_reads`), which no cache would add to every request. Requests per second are of the
process's own time on one core, and each batch goes through all budgets in turn, so that other work on the machine does not show as
a dip in the curve. `against no cache` is their ratio to those of the row without a budget: the median of ten rounds of batches, and
the lowest and highest. On a CPU both tiers are the same memory, and what comes `from host` costs a copy within it. Prints a
Markdown page; last, one JSON line. `--chart PATH` also writes throughput against hit rate as SVG.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from benchmarks.conditions import commit, cpu_model
from longer.arrays import Candidates, Histories, Int64
from longer.charts import curve
from longer.config import load_settings
from longer.data.columns import single_array
from longer.data.sequences import KeepRule, Older, build_sequences
from longer.data.tables import histories_in_order
from longer.datasets import complete_journey, generator
from longer.model.longer import Longer
from longer.model.states import UserState, append, encode, rows_for, score
from longer.model_settings import ModelSettings
from longer.schema import EventSchema, Feature
from longer.serving.cache import Entry, Known, StateVersion
from longer.serving.fingerprint import EventPrint
from longer.serving.store import StateStore
from longer.table_settings import GenerateSettings
from longer.training_settings import TaskSettings

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
HOST_PARTS = {"device": 0.0, "device + host": 0.75}
"""Of a budget, how much is in host memory."""
NO_CACHE = ("device", 0.0)
NUM_CANDIDATES, BATCH, NUM_ROUNDS = 50, 16, 10
VERSION = StateVersion("benchmark", "schema", "appendable")
NO_EVENTS = EventPrint(0, 0, np.zeros(1, np.uint64), np.uint64(0))


@dataclass(frozen=True)
class Log:
    """A log's users with all their events, and R requests in order of time, each about the events before `end_R`."""

    name: str
    schema: EventSchema
    model: ModelSettings
    histories: Histories
    row_R: Int64
    end_R: Int64
    ts_R: Int64


def complete_journey_log(one_user_in: int) -> Log:
    settings = load_settings("configs/quickstart.yaml")
    names = settings.event_schema.events_arrow().names
    [events] = complete_journey.read(complete_journey.locate("package")[0], names)
    events = events.select(names).cast(settings.event_schema.events_arrow())
    return _log("complete_journey", events, settings.event_schema, settings.model, one_user_in, every=None)


def generated_log() -> Log:
    schema = EventSchema(features=(Feature(name="category", kind="categorical", of="item"),))
    asked = GenerateSettings(num_users=600, num_events=400_000, num_items=5_000, num_clusters=100)
    parts = [generator.generate(asked, 0, schema, c.day, c.first, c.end) for c in generator.chunks(asked)]
    events = pa.concat_tables(parts).cast(schema.events_arrow())
    return _log("generated", events, schema, load_settings("configs/quickstart.yaml").model, 1, every=10)


def _log(
    name: str, events: pa.Table, schema: EventSchema, model: ModelSettings, one_user_in: int, every: int | None
) -> Log:
    """Requests before each run of events of one time (`every` is None), or before every so-manieth event."""
    users = pc.unique(single_array(events["user_id"])).sort()[::one_user_in]
    events = events.filter(pc.is_in(events["user_id"], users))
    rule = KeepRule(len(events), model.windows.stride_events)
    histories = histories_in_order(build_sequences(events, Older.none(schema), schema, rule), users, schema)
    row_E = np.repeat(np.arange(len(histories)), np.diff(histories.offsets_B1))
    index_E = np.arange(len(row_E)) - histories.offsets_B1[row_E]
    ts_E = histories.event_ts_E
    is_first_E = np.append(True, (np.diff(ts_E) != 0) | (np.diff(row_E) != 0))  # nothing of its own time is before it
    if every:
        is_first_E &= np.arange(len(row_E)) % every == 0
    asked_E = np.flatnonzero(is_first_E)
    asked_E = asked_E[np.argsort(ts_E[asked_E], kind="stable")]
    return Log(name, schema, model, histories, row_E[asked_E], index_E[asked_E], ts_E[asked_E])


def batches(row_R: Int64) -> Iterator[slice]:
    """Runs of up to `BATCH` requests of different users."""
    begin, seen = 0, set[int]()
    for r, row in enumerate(row_R.tolist()):
        if row in seen or r - begin == BATCH:
            yield slice(begin, r)
            begin, seen = r, set()
        seen.add(row)
    yield slice(begin, len(row_R))


class Replay:
    """Requests through a store: each is a hit, an append, a load, or cold if the user has done nothing yet."""

    def __init__(self, log: Log, model: Longer, store: StateStore) -> None:
        self.log, self.model, self.store = log, model, store
        rng, num = np.random.default_rng(0), BATCH * NUM_CANDIDATES
        picked = rng.integers(0, len(log.histories.event_ts_E), num)
        item = ("item_id", *log.schema.features_of("item", "categorical"), *log.schema.features_of("item", "numeric"))
        self.features = {name: log.histories.features[name][picked] for name in item}

    def ask(self, row_R: Int64, end_R: Int64, ts_R: Int64) -> None:
        store, rows = self.store, row_R.tolist()
        taken = [store.take(row, VERSION) for row in rows]
        store.bring(held for held in taken if held)
        states: list[UserState | None] = [held.entry.state if held else None for held in taken]
        grown = [i for i, state in enumerate(states) if state and state.num_events < end_R[i]]
        new = [i for i, state in enumerate(states) if not state]
        for i, state in enumerate(states):
            if state and i not in grown:
                store.counters.count("hit")
        if grown:
            bases = [state for i in grown if (state := states[i])]
            begin = np.array([base.num_events for base in bases])
            needed = rows_for(store.layout, end_R[grown])
            slots = [b.slot if n <= b.slot.size else store.slots([n])[0] for b, n in zip(bases, needed, strict=True)]
            events = self.log.histories.slice_events(row_R[grown], begin, end_R[grown])
            for i, state in zip(grown, append(self.model, store.pool, bases, events, slots), strict=True):
                self._keep(rows[i], state, "append")
                states[i] = state
        if new:
            begin = self.model.windows.history_start(end_R[new]) * self.model.windows.merge_size
            events = self.log.histories.slice_events(row_R[new], begin, end_R[new])
            slots = store.slots(rows_for(store.layout, end_R[new]))
            for i, state in zip(new, encode(self.model, store.pool, events, slots), strict=True):
                self._keep(rows[i], state, "load" if end_R[i] else "cold")
                states[i] = state
        candidates = {name: values[: len(rows) * NUM_CANDIDATES] for name, values in self.features.items()}
        offsets = np.arange(len(rows) + 1) * NUM_CANDIDATES
        score(self.model, store.pool, [s for s in states if s], ts_R, Candidates(offsets, candidates))
        store.release()

    def _keep(self, row: int, state: UserState, source: str) -> None:
        entry = Entry(state, state.last_event_ts, 0, Known("", 0), NO_EVENTS, True)
        held = self.store.hold(row, VERSION)
        if held and held.entry.state.slot is state.slot:
            self.store.update(row, entry)
        else:
            self.store.put(row, VERSION, entry)
        self.store.counters.count(source)


def replay(log: Log, num_requests: int, arms: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """The log's last requests at budgets of these shares of what the states of all who ask in them need at the end.

    Each batch goes through all arms before the next one does, so that what slows the machine slows all alike. Throughput is told
    against the first arm's, of each of `NUM_ROUNDS` rounds of batches.
    """
    torch.manual_seed(0)
    model = Longer(log.model, log.schema, (TaskSettings(name="click"),)).eval()
    store = StateStore(model, 0)
    asked = slice(max(0, len(log.row_R) - num_requests), len(log.row_R))
    row_R, end_R, ts_R = log.row_R[asked], log.end_R[asked], log.ts_R[asked]
    sizes = rows_for(store.layout, log.histories.end_index_B[np.unique(row_R)])
    all_bytes = sum(store.pool.slots.size_for(int(n)) for n in sizes) * store.layout.row_bytes
    budgets = [(int(share * all_bytes), int(share * all_bytes * HOST_PARTS[tiers])) for tiers, share in arms]
    runs = [Replay(log, model, StateStore(model, budget - host, host)) for budget, host in budgets]
    filling = [batch for batch in batches(row_R) if batch.start < len(row_R) // 2]
    counted = [batch for batch in batches(row_R) if batch.start >= len(row_R) // 2]
    for batch, run in product(filling, [run for run, (_, share) in zip(runs, arms, strict=True) if share]):
        run.ask(row_R[batch], end_R[batch], ts_R[batch])
    before_A = [run.store.counters.as_dict() for run in runs]
    seconds_AN = np.zeros((len(arms), len(counted)))
    for n, batch in enumerate(counted):
        for number in range(len(arms)):
            arm, started = (number + n) % len(arms), time.process_time()
            runs[arm].ask(row_R[batch], end_R[batch], ts_R[batch])
            seconds_AN[arm, n] = time.process_time() - started
    rounds_AK = np.stack([part.sum(1) for part in np.array_split(seconds_AN, min(NUM_ROUNDS, len(counted)), axis=1)], 1)
    rows, num_counted = [], sum(batch.stop - batch.start for batch in counted)
    for arm, (tiers, share) in enumerate(arms):
        counts = {name: n - before_A[arm][name] for name, n in runs[arm].store.counters.as_dict().items()}
        shares = {name: counts[name] / num_counted for name in ("hit", "append", "load", "cold")}
        ratios_K = rounds_AK[0] / rounds_AK[arm]
        rows.append({
            "log": log.name, "tiers": tiers, "budget_share": share, "budget_bytes": budgets[arm][0],
            "users": len(sizes), "requests": num_counted, **shares, "in_store": shares["hit"] + shares["append"],
            "from_host": counts["promote"] / num_counted, "evicted": counts["evict"],
            "requests_per_s": num_counted / rounds_AK[arm].sum(), "against_no_cache": float(np.median(ratios_K)),
            "against_no_cache_rounds": [float(ratios_K.min()), float(ratios_K.max())],
        })  # fmt: skip
    return rows


def shown(row: dict[str, Any]) -> str:
    shares = " | ".join(f"{row[name]:.1%}" for name in ("hit", "append", "load", "cold", "from_host"))
    return (
        f"| {row['log']} | {row['tiers']} | {row['budget_share']:.0%} | {row['budget_bytes'] / 2**20:.1f} "
        f"| {shares} | {row['evicted']} | {row['requests_per_s']:.0f} | {_ratio(row)} |"
    )


def _ratio(row: dict[str, Any]) -> str:
    lowest, highest = row["against_no_cache_rounds"]
    return f"{row['against_no_cache']:.2f} ({lowest:.2f} to {highest:.2f})" if row["budget_share"] else "1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--requests", type=int, default=3_000, help="requests of each log, half of them to fill the store"
    )
    parser.add_argument(
        "--users", type=int, default=8, help="one household in so many of the Complete Journey (default 8)"
    )
    parser.add_argument("--one-tier", action="store_true", help="only budgets that are all on the device")
    parser.add_argument("--chart", type=Path, help="where to write the chart, an SVG")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("# Hit rate of the store of user states by its budget\n")
    print(f"- {cpu_model()}, one thread; shared machine; commit {commit()}; torch {torch.__version__}")
    print(
        f"- {NUM_CANDIDATES} candidates a request, batches of up to {BATCH}; states in float32; seconds of the process's own time\n"
    )
    print(
        "| log | tiers | budget | MiB | hit | append | load | cold | from host | evicted | requests/s | against no cache |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    arms = [NO_CACHE, *product(["device"] if args.one_tier else HOST_PARTS, SHARES)]
    rows = []
    for log in (complete_journey_log(args.users), generated_log()):
        print(f"{log.name}: {len(log.histories)} users, {len(log.row_R)} requests in all", file=sys.stderr)
        found = replay(log, args.requests, arms)
        print(*map(shown, found), sep="\n", flush=True)
        rows += found
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(f"{row['log']}, {row['tiers']}", []).append(row)
    if args.chart:
        points = {name: [(r["in_store"], r["requests_per_s"]) for r in line] for name, line in lines.items()}
        args.chart.write_text(curve(points, "share of requests whose user's state was in the store", "requests/s"))
    ratios = {
        name: {
            f"{r['budget_share']:.0%}": {
                "in_store": round(r["in_store"], 4),
                "from_host": round(r["from_host"], 4),
                "requests_per_s": round(r["requests_per_s"], 1),
                "against_no_cache": round(r["against_no_cache"], 3),
            }
            for r in line
        }
        for name, line in lines.items()
    }
    print()
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
