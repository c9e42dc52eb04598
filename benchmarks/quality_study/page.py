"""The study's Markdown page from its records: means over seeds, and how far seeds lie apart."""

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.quality_study.arms import BASES, FEATURES, QUICK, UNMERGED, Arm, model_settings
from benchmarks.quality_study.goals import goals
from benchmarks.quality_study.rows import Record, auc, by_arm, curve, mean, spread
from benchmarks.quality_study.steering import trials, validated
from benchmarks.quality_study.tables import encoders, frontiers, lengths, same_flops, table, widths
from benchmarks.quality_study.tuning import SEARCH, stands

_STARTS = """\
- every encoder that attends begins as a search for the candidate's own item, as LONGER does: the Transformer's first layer is made
  as LONGER's; queries and keys of SIM's units and TWIN are equal identities; HSTU's too, with a bias that puts unlike events below
  0; one unit of DIN's weighs by the product. All are given the candidate with what is known of its request; the head reads
  [candidate, read, candidate * read]
- SIM's short-term branch is attention over the newest 50 events where the paper has DIEN; its soft search is learned with the rest,
  by no loss of its own, and its values are projected. The user tower is trained on the same rows and labels as all others, not by
  sampled softmax, and its frozen vector is one more input
- how LONGER begins was settled before the study by 250 households of Complete Journey, and the table that settled it
  (quality_merging_cpu2_2026-11-27.md) is of 500 requests of the test split, where it was worth .15 of AUC; since then only the
  validation split steers, and the same comparison there is a table of its own, once it is trained ("what merging lost")
- "none" is the user and the candidate alone, "none+features" the interaction features alone, without any sequence model;
  "longer, no history" is LONGER's layers with candidates that see themselves alone, trained as LONGER is; K = 1 keeps its merge
- train s: beside whatever else ran on the card, which several processes share: no measure of an encoder's speed
- what each arm is compared at is the same: every arm of a log takes the same number of steps a pass, each of the same requests"""

_LOGS = {
    "journey": "Complete Journey: a request is a basket, its candidates what was bought and, for each, four drawn items as "
    "popular; a label is a purchase.",
    "generated": "Generated: a request asks, as an episode begins, which item is of the cluster that its user returns to after a "
    "period; only what she did one period before tells.",
    "movielens": "MovieLens 100K: a request is one film, a label a like: four stars or more. Split by time: 80, 10 and 10 percent.",
}


def page(records: Sequence[Record]) -> str:
    """Goals and tables of every log that has records; the last line is JSON."""
    records = list({record.get("key", record.get("left_out")): record for record in records}.values())
    trained = [record for record in records if "trained" in record]
    _check_alike(trained)
    stale = [r["key"] for r in trained if r["group"] not in ("tuning", "tried") and not stands(r, trained, _arm_of(r))]
    if not trained:
        return "no arm is trained yet"
    tested = [record for record in trained if "test" in record]
    logs = sorted({record["log"] for record in records}, key=["journey", "generated", "movielens"].index)
    parts = ["# Quality: LONGER and the encoders that it is compared with", _conditions(records, trained, stale)]
    for log in logs:
        all_of_log = [record for record in records if record.get("log") == log]
        mine = [record for record in tested if record["log"] == log]
        measured = next((r for r in records if r.get("key") == f"{log}/baselines"), {})
        baselines = measured.get("baselines", {})
        parts += [f"## {log}", _about(log, measured, mine, trained[0]["quick"])]
        if log == "journey":
            parts.append("### Goals\n\n" + "\n".join(goals(mine, baselines)))
        parts += [encoders(mine, baselines), same_flops(mine), frontiers(mine), lengths(mine)]
        parts += [
            table(
                mine, "tables", "Encoders whose events are as wide as LONGER's, on ids alone: items' tables of one size"
            ),
            table(mine, "switches", "Switches of LONGER, on ids alone unless said, trained as LONGER is"),
            validated(
                all_of_log,
                "undone",
                ("longer", UNMERGED),
                "What merging lost: LONGER on ids alone with a part of its start taken back",
            ),
            validated(
                all_of_log,
                "tried",
                ("longer" + FEATURES, "hstu" + FEATURES, UNMERGED, "learnable queries"),
                "What else was tried: LONGER and the encoder nearest to it with the features, and switches at rates of their own",
            ),
            widths(mine),
            trials(all_of_log),
        ]
    first = next((log for log in logs if any(record["log"] == log for record in tested)), logs[0])
    return "\n\n".join([*filter(None, parts), json.dumps(_summary(tested, first))])


def _check_alike(trained: Sequence[Record]) -> None:
    """What is compared was trained and tested alike: a file of records may be of several runs."""
    for what, value in (
        ("took different steps a pass", lambda r: (r["train_requests"], r["steps"] / r["trained"]["passes"])),
        ("were computed in different precision", lambda r: "CPU" in r["hardware"]),
        ("were validated on different requests", lambda r: r.get("valid", {}).get("rows")),
        ("were tested on different requests", lambda r: r["test"]["rows"] if "test" in r else None),
    ):
        found = {(r["log"], alike) for r in trained if (alike := value(r)) is not None}
        assert len(found) == len({log for log, _ in found}), f"arms of one log {what}: {sorted(found)}"


def _arm_of(record: Record) -> Arm:
    """As far as it says how it is trained."""
    name, log, group, seed = (record[key] for key in ("arm", "log", "group", "seed"))
    return Arm(name, log, group, seed, encoder=record["encoder"], features=record["features"])


def _conditions(records: Sequence[Record], trained: Sequence[Record], stale: Sequence[str]) -> str:
    first = trained[0]
    cards = ", ".join(dict.fromkeys(record["hardware"] for record in trained))
    budgets = {(r["log"], r["train_requests"], r["steps"] // r["trained"]["passes"]) for r in trained}
    each = ", ".join(f"{log} {requests:,} requests in {steps:,} steps" for log, requests, steps in sorted(budgets))
    done = {record.get("key") for record in records}
    left_out = {r["left_out"]: r["why"] for r in records if "left_out" in r and r["left_out"] not in done}
    lines = [
        f"- hardware: {cards}; torch {first['torch']}{'; quick sizes' if first['quick'] else ''}",
        f"- a pass: the newest requests ({each}); bfloat16 on a GPU",
        f"- learning rates of tables and of dense layers, and the number of passes (up to {SEARCH.passes}): as each encoder with "
        "and without the features validated best, LONGER's for all of its variants; below are the trials, and whom the end of the "
        "search or the last pass has stopped. What has no trials is trained as with, or without, the features, else by defaults",
        "- ± is half of the range between seeds; no ± means one seed",
        "- FLOPs: counted, forward, of the test request with the longest history and the mean number of candidates, masked pairs "
        "included; keys of items (TWIN) and vectors of users (the frozen tower), which can be computed before, are counted, and of "
        "the tower's last layer every event, though one is read",
        _STARTS,
    ]
    if stale:
        lines.append(
            f"- to be trained again, since trials have found better for their encoder: {', '.join(sorted(stale))}"
        )
    if left_out:
        lines.append(f"- left out: {', '.join(f'{arm} ({why})' for arm, why in sorted(left_out.items()))}")
    return "\n".join(lines)


def _about(log: str, measured: Record, tested: Sequence[Record], quick: bool) -> str:
    """What is asked of this log, of how much of it, and what LONGER is where nothing else is said."""
    base, sizes = (QUICK if quick else BASES)[log], measured.get("sizes")
    longer, lines = model_settings(Arm("longer", log, "encoders", 0), base), [_LOGS[log]]
    if sizes:
        lines.append(f"{sizes['users']:,} users, {sizes['events']:,} events, the longest history {sizes['longest']:,}.")
    if tested:
        test, of_requests = tested[0]["test"], f" of {sizes['tested']:,} requests" if sizes else ""
        lines.append(
            f"Tested: {test['rows']:,} candidates{of_requests}, {test['long_rows']:,} of them with a long history: "
            f"{base.long_from:,} events and more before the request."
        )
    lines.append(
        f"LONGER, where nothing else is said: L = {base.length:,}, K = {longer.merge_size} with InnerTrans, the newest "
        f"k = {longer.query_groups} groups as queries, {longer.num_self_layers} self-causal layer, D = {longer.width}."
    )
    return " ".join(lines)


def _summary(trained: Sequence[Record], log: str) -> dict[str, Any]:
    """Of the first log: AUC of every encoder and of LONGER by length, and the widest spread between seeds of an encoder."""
    mine = [record for record in trained if record["log"] == log]
    arms = by_arm(record for record in mine if record["group"] == "encoders")
    return {
        "auc": {arm: mean(records, auc) for arm, records in arms.items()},
        "auc_by_length": {length: mean(records, auc) for length, records in curve(mine, True).items()},
        "spread": max((spread(records, auc) for records in arms.values() if len(records) > 1), default=None),
    }
