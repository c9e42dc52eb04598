"""What buckets' records say of a run together, as its manifest and its lines tell it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from longer.data.records import Record
from longer.progress import say
from longer.serving.batch_output import Run


def totals_of(records: Sequence[Record]) -> dict[str, Any]:
    """Of all buckets, whichever run has done them on what; a device is a GPU, its share that an actor has, or a CPU.

    What it costs that actors start, with their load and warm-up, is told apart, and a part of the whole; it counts from the
    actor's constructor, so the start of its process and its imports, some seconds, are in neither.
    """
    num_scores, compared = (sum(record[name] for record in records) for name in ("num_scores", "num_compared"))
    actors = {record["actor"]["name"]: record["actor"] for record in records}.values()
    start_s, steady_s = (
        {name: sum(part[name] for part in parts) for name in ("device_s", "cpu_s")} for parts in (actors, records)
    )
    device_s = start_s["device_s"] + steady_s["device_s"]
    return {
        "num_requests": sum(record["num_requests"] for record in records),
        "num_users": sum(record["num_users"] for record in records),
        "num_rows": num_scores,
        "device": "+".join(sorted({record["device"] for record in records})),
        "device_s": device_s,
        "start_device_s": start_s["device_s"],
        "cpu_s": start_s["cpu_s"] + steady_s["cpu_s"],  # of the actors' processes, all of their threads
        "start_cpu_s": start_s["cpu_s"],
        "peak_bytes": max((record["peak_bytes"] for record in records), default=0),  # of one actor's process
        "peak_gpu_bytes": max((record["peak_gpu_bytes"] for record in records), default=0),
        # of it, for buckets: beyond what an actor held once it was up, its model and items
        "working_bytes": max((record["working_bytes"] for record in records), default=0),
        "device_s_per_million_scores": device_s / num_scores * 1e6 if num_scores else None,
        "steady_device_s_per_million_scores": steady_s["device_s"] / num_scores * 1e6 if num_scores else None,
        "online_check": {
            "requests": compared,
            "check_requests": min((record["check_requests"] for record in records), default=0),
            "max_abs_diff": max((record["max_abs_diff"] for record in records), default=0.0) if compared else None,
            **({} if compared else {"nothing_because": _why_nothing(records)}),
        },
    }


def _why_nothing(records: Sequence[Record]) -> str:
    """Was compared."""
    if all(record.get("has_states", True) for record in records):
        return "no request that was drawn has candidates"
    return "this model keeps no user states, and so there is no serving path"


def rates_of(fresh: Sequence[Record], seconds: float) -> dict[str, Any]:
    """Of the buckets that this run has done; null if an interrupted one had done all."""
    rows, users = (sum(record[name] for record in fresh) for name in ("num_scores", "num_users"))
    return {
        "num_rows_of_this_run": rows,
        "num_users_of_this_run": users,
        "rows_per_s": rows / seconds if fresh else None,
        "users_per_s": users / seconds if fresh else None,
    }


@dataclass(frozen=True)
class Progress:
    """What a run tells of itself while its buckets' records come; `buckets` are their sizes."""

    job: str
    buckets: dict[int, int]
    run: Run
    records: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> Record:
        """The record, which has just come."""
        self.records.append(_on_this_clock(record))
        return self.records[-1]

    def seconds(self) -> float:
        """Since the first bucket was begun: actors have started before that."""
        return time.time() - min(record["begun_at"] for record in self.records)

    def part_done(self) -> float:
        """Of the buckets' sizes; half of those that are under way."""
        done = {record["bucket"] for record in self.records}
        half_done = (self.run.begun.keys() - done) & self.buckets.keys()
        sizes_done = sum(self.buckets[b] for b in done) + sum(self.buckets[b] for b in half_done) / 2
        return sizes_done / sum(self.buckets.values())

    def note(self) -> str:
        rates = rates_of(self.records, self.seconds())
        scores = f"{rates['rows_per_s']:.0f} scores/s, " if rates["rows_per_s"] else ""  # vectors are none
        return f"{scores}{rates['users_per_s']:.1f} users/s{cost_in_words(totals_of(self.records))}"

    def tell_of_the_first(self) -> None:
        if not self.records:
            say(self.job, f"{len(self.run.begun)} buckets begun, none done yet")


def _on_this_clock(record: Record) -> Record:
    """A bucket's record that has just come, its times those of this node's clock: others' may be minutes off."""
    now = time.time()
    return record | {"begun_at": now - (record["done_at"] - record["begun_at"]), "done_at": now}


def actors_of(fresh: Sequence[Record], started_at: float) -> list[dict[str, Any]]:
    """Where each actor's time went, from the moment that the run began.

    `stages_s` sums over its buckets, of which a GPU has two at once: `read` and `write` are waits for what is done meanwhile,
    `queue` for the bucket before on the device, `wait` for others to be compared with, and the last of them has the `check` of all.
    `encode` ends when it is launched, so `score` waits for both.
    """
    actors: dict[str, list[Record]] = {}
    for record in fresh:
        actors.setdefault(record["actor"]["name"], []).append(record)
    return [
        {
            "name": name,
            "buckets": len(records),
            "scores": sum(record["num_scores"] for record in records),
            "begun_s": min(record["begun_at"] for record in records) - started_at,
            "done_s": max(record["done_at"] for record in records) - started_at,
            "buckets_s": sum(record["done_at"] - record["begun_at"] for record in records),
            "start_s": _seconds([records[0]["actor"]["start_ms"]]),
            "stages_s": _seconds([record["stages_ms"] for record in records]),
        }
        for name, records in sorted(actors.items())
    ]


def held_device_s(fresh: Sequence[Record], share: float, ended_at: float) -> float:
    """Seconds of devices that the run's actors have held, from their starts to its end, idle or not; none of those that died
    before they had done a bucket."""
    began = {record["actor"]["name"]: record["done_at"] - record["held_s"] for record in fresh}
    return sum(share * (ended_at - began_at) for began_at in began.values())


def _seconds(stages_ms: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for stages in stages_ms for name in stages)
    return {name: sum(stages.get(name, 0.0) for stages in stages_ms) / 1000 for name in names}


def in_words(manifest: dict[str, Any]) -> str:
    check = manifest["online_check"]
    told = f"{manifest['num_users']} users"
    if manifest["num_rows"]:
        told += f", {manifest['num_rows']} scores"
        if manifest["num_rows_of_this_run"] < manifest["num_rows"]:
            told += f", {manifest['num_rows_of_this_run']} of them by this run"
        if manifest["rows_per_s"] is not None:
            told += f", {manifest['rows_per_s']:.0f} a second"
        told += cost_in_words(manifest)
    if check["requests"]:
        told += f"; {check['requests']} requests scored by the serving path too, largest difference {check['max_abs_diff']:.1e}"
    else:
        told += f"; nothing compared with the serving path: {check['nothing_because']}"
    return told


def cost_in_words(totals: dict[str, Any]) -> str:
    cost, steady = totals["device_s_per_million_scores"], totals["steady_device_s_per_million_scores"]
    if cost is None:
        return ""
    device = totals["device"].replace("cuda", "GPU").replace("cpu", "CPU")
    return f", {steady:.3g} {device}-s a million scores, {cost:.3g} with the start of actors"
