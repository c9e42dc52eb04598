"""A plan on paper for any number of users, from measured constants: python -m benchmarks.scaling [--users 10000000 ...]

Prints the tables of docs/scaling.md, or those of your own numbers; last, one JSON line. Nothing is run or measured here.
`--update docs/scaling.md` writes them into that document again after a results page has changed.
"""

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from benchmarks.capacity.measured import Measured, measured
from benchmarks.capacity.plan import DAYS_A_MONTH, MODEL, Plan, Workload

PLANS = {
    "billion": Workload(),
    "ten_million": Workload(users=10_000_000, events_per_user=1_000, requests_per_day=100e6, cluster_cores=16),
}
Row = tuple[str, str, str]


def sequence_rows(plan: Plan) -> list[Row]:
    core, build = plan.asked.usd_per_core_hour, plan.build_core_hours()
    return [
        ("events", "users x events a user", short(plan.events)),
        ("event log", "events x log bytes / 200 M", size(plan.log_bytes())),
        ("sequence table", "events x table bytes / 200 M", size(plan.sequences_bytes())),
        ("build", "events / (build events/s / 2 cores)", f"{short(build)} core-hours"),
        ("build, time", "core-hours / cores of the cluster", hours(build / plan.asked.cluster_cores)),
        ("build, price", "core-hours x price", usd(build * core)),
        ("network a core must get", "(log + table bytes) / core-seconds, scratch not counted",
         f"{size(plan.core_bytes_per_s())}/s"),
        ("tables that keep to the code's limits", "events / min(blocks x block, buckets x bucket)",
         short(plan.num_tables())),
        ("new events a day", "events / history days", short(plan.new_events)),
        ("one more day", "new events / (one more day's events/s / 2 cores)", f"{short(plan.increment_core_hours())} core-hours"),
        ("rewriting, its share of a day", "build core-hours / (merge_share x history days)",
         f"{short(plan.rewrite_core_hours())} core-hours"),
    ]  # fmt: skip


def state_rows(plan: Plan) -> list[Row]:
    users, slot = plan.asked.users, "`StatePool`'s slot for its rows"
    return [
        ("state, bf16", slot, size(plan.state_bytes("bf16"))),
        ("state, bf16, the largest until the windows move", "over the next s x K events", size(plan.most_state_bytes("bf16"))),
        ("state, float32 (what `state_precision` is if nobody sets it)", slot, size(plan.state_bytes("float32"))),
        ("states a GPU, bf16", "GB for states / state", short(plan.states_per_gpu("bf16"))),
        ("states a GPU, float32", "GB for states / state", short(plan.states_per_gpu("float32"))),
        ("what the store takes of a GPU for that, bf16", "budget, and room for a batch and idle slabs",
         size(plan.reserved_bytes("bf16"))),
        ("states of all users, bf16", "users x state", size(users * plan.state_bytes("bf16"))),
        ("index of a state, in the replica's host memory", "`entry_bytes` of `serving/room.py`", size(plan.index_bytes())),
        ("index of a GPU's states, bf16", "states a GPU x index", size(plan.states_per_gpu("bf16") * plan.index_bytes())),
    ]  # fmt: skip


def training_rows(plan: Plan) -> list[Row]:
    day, days = plan.training_gpu_hours(), plan.asked.training_days
    faster = plan.m.captured_step_ms.value / plan.m.train_step_ms.value
    return [
        ("events trained, a GPU", "users of a step x mean events / step", f"{short(plan.trained_events_per_s())} a second"),
        ("GPU time a request", "events in the window / that", f"{plan.encode_s() * 1e3:.2f} ms"),
        ("the same for 2,000 events; as measured", "events / that; step / users",
         f"{2e3 / plan.trained_events_per_s() * 1e3:.2f} ms; {plan.m.full_step_ms.value / plan.m.full_step_users.value:.2f} ms"),
        ("one day's requests", "requests a day x GPU time", f"{short(day)} GPU-hours"),
        ("GPUs that keep up", "GPU-hours / 24", short(math.ceil(day / 24))),
        ("the same, step as a CUDA graph", "x graph step / step", short(math.ceil(day / 24 * faster))),
        ("first training", "training days x one day", f"{short(days * day)} GPU-hours"),
        ("first training, price", "GPU-hours x price", usd(days * day * plan.asked.usd_per_gpu_hour)),
        ("a user table with a row a user, and AdamW's", "users x D x 4 bytes x 3", size(plan.asked.users * MODEL.width * 12)),
    ]  # fmt: skip


def fleet_table(plan: Plan) -> list[str]:
    shares = plan.asked.hit_shares
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        ("requests/s at the peak", "requests a day / 86,400 x peak", lambda h: short(plan.peak_requests_per_s)),
        ("misses/s", "peak x (1 - hit)", lambda h: short(plan.misses_per_s(h))),
        ("GPU time a request", "score + (1 - hit) x encode", lambda h: f"{plan.gpu_s(h) * 1e3:.2f} ms"),
        ("of it, scoring", "`score()` / 32, x candidates / 500", lambda h: f"{plan.score_s() * 1e3:.2f} ms"),
        ("the same with a CUDA graph", "(`score()` - model part + graph) / 32, x candidates / 500",
         lambda h: f"{plan.graph_score_s() * 1e3:.2f} ms"),
        ("the same on one H200 as served, states there with 8 new events each",
         "(score x candidates / 500 + hit x append + (1 - hit) x encode) / 32",
         lambda h: f"{plan.served_gpu_s(h) * 1e3:.2f} ms"),
        ("replicas, one GPU each", "peak x GPU time / utilisation", lambda h: short(plan.replicas(h))),
        ("states in the fleet", "replicas x states a GPU (bf16), at most users", lambda h: short(plan.fleet_states(h))),
        ("share of users", "states / users", lambda h: f"{plan.fleet_states(h) / plan.asked.users:.2%}"),
        ("a state stays, unasked", "states / misses a second", lambda h: hours(plan.stay_s(h) / 3600)),
        ("cores that read histories", "misses/s x point read", lambda h: short(plan.read_cores(h))),
        ("histories read", "misses/s x bytes of a read", lambda h: f"{size(plan.read_bytes_per_s(h))}/s"),
        ("price a day", "24 x (replicas, cores) x prices", lambda h: usd(plan.fleet_usd_per_day(h))),
    ]  # fmt: skip
    heads = [f"hit {share:.0%}" for share in shares]
    return _table(["", "formula", *heads], [[what, formula, *map(of, shares)] for what, formula, of in rows])


def month_rows(plan: Plan) -> list[Row]:
    asked, hit = plan.asked, plan.priced_hit
    stored = (plan.log_bytes() + plan.sequences_bytes()) / 1e9 * asked.usd_per_gb_month
    days = DAYS_A_MONTH * (plan.increment_core_hours() + plan.rewrite_core_hours()) * asked.usd_per_core_hour
    trained = DAYS_A_MONTH * plan.training_gpu_hours() * asked.usd_per_gpu_hour
    fleet = DAYS_A_MONTH * plan.fleet_usd_per_day(hit)
    return [
        ("storage, one copy of log and table", "GB x price", usd(stored)),
        ("30 incremental days", "30 x (one more day + rewriting) x price", usd(days)),
        ("30 days of training", "30 x GPU-hours x price", usd(trained)),
        (f"30 days of the fleet, hit {hit:.0%}", "30 x price a day", usd(fleet)),
        ("all of it", "sum", usd(stored + days + trained + fleet)),
    ]


def plan_tables(plan: Plan) -> str:
    head = ["", "formula", "value"]
    titled = [
        ("Asked for, and assumed", _table(["", "value"], asked_rows(plan))),
        ("Sequences", _table(head, sequence_rows(plan))),
        ("User states", _table(head, state_rows(plan))),
        ("Training", _table(head, training_rows(plan))),
        ("Online fleet", fleet_table(plan)),
        ("A month at the example prices", _table(head, month_rows(plan))),
    ]
    return "\n\n".join(f"**{title}**\n\n" + "\n".join(lines) for title, lines in titled)


def asked_rows(plan: Plan) -> list[tuple[str, str]]:
    return [
        (field.description or "", _shown(getattr(plan.asked, name))) for name, field in Workload.model_fields.items()
    ]


def constant_table(constants: Measured) -> str:
    rows = [[c.what, f"`{c.text}`", c.at, f"`{c.source}`"] for c in constants.constants()]
    return "\n".join(_table(["constant", "as it stands there", "measured at", "source"], rows))


def short(value: float) -> str:
    """Three digits, or whole numbers up to a million; M, B and T above it."""
    for limit, sign in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if value >= limit * 0.9995:
            return f"{value / limit:,.3g}{sign}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(num_bytes: float) -> str:
    for limit, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= limit * 0.9995:
            return f"{num_bytes / limit:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} KB"


def hours(value: float) -> str:
    for limit, unit in ((24.0, "days"), (1.0, "hours"), (1 / 60, "minutes")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value * 3600:.3g} s"


def usd(value: float) -> str:
    return f"${short(value)}"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{share:.0%}" for share in value)
    return short(value) if isinstance(value, int | float) else str(value)


def _table(head: list[str], rows: "list[Row] | list[tuple[str, str]] | list[list[str]]") -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def parts(constants: Measured) -> dict[str, str]:
    """What the document's marked parts hold, by name."""
    plans = {name: plan_tables(Plan(asked, constants)) for name, asked in PLANS.items()}
    return {"constants": constant_table(constants), **plans}


def updated(document: str, by_name: dict[str, str]) -> str:
    """The document with its marked parts written anew; ValueError names a part that it does not have."""
    for name, text in by_name.items():
        marked = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)", re.S)
        found = marked.search(document)
        if not found:
            raise ValueError(f"the document has no part '{name}'")
        document = f"{document[: found.end(1)]}\n{text}\n\n{document[found.start(2) :]}"
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", metavar="FILE", help="write the tables of the document's own two plans into it")
    for name, field in Workload.model_fields.items():
        kind, several = (float, "+") if name == "hit_shares" else (type(field.default), None)
        parser.add_argument(f"--{name}", type=kind, nargs=several, default=field.default, help=field.description)
    options = vars(parser.parse_args())
    file, constants = options.pop("update"), measured()
    if file:
        Path(file).write_text(updated(Path(file).read_text(), parts(constants)))
    try:
        plan = Plan(Workload(**options), constants)
    except ValidationError as error:
        wrong = error.errors()[0]
        parser.error(f"argument --{wrong['loc'][0]}: {wrong['msg']}")
    print(f"{constant_table(constants)}\n\n{plan_tables(plan)}\n\n{json.dumps(plan.summary())}")


if __name__ == "__main__":
    main()
