"""The study's Markdown page from its records: means over seeds, and how far seeds lie apart."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.quality_study.arms import BASES, FEATURES, QUICK, UNMERGED, Arm, model_settings
from benchmarks.quality_study.goals import goals
from benchmarks.quality_study.rows import (
    MOST_EXPONENT,
    Record,
    auc,
    by_arm,
    curve,
    gauc,
    long_auc,
    mean,
    mega_flops,
    power_law,
    spread,
    with_spread,
)

_SAME_FLOPS = 1.25
_HEADER = (
    "| arm | AUC | AUC, long histories | GAUC | log loss | dense parameters | table parameters | MFLOPs | passes | train s |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
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
  validation split steers, and the table "what merging lost" is that comparison there
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
    if not trained:
        return "no arm is trained yet"
    tested = [record for record in trained if "test" in record]
    logs = sorted({record["log"] for record in records}, key=["journey", "generated", "movielens"].index)
    parts = ["# Quality: LONGER and the encoders that it is compared with", _conditions(records, trained)]
    for log in logs:
        all_of_log = [record for record in records if record.get("log") == log]
        mine = [record for record in tested if record["log"] == log]
        measured = next((r for r in records if r.get("key") == f"{log}/baselines"), {})
        baselines = measured.get("baselines", {})
        parts += [f"## {log}", _about(log, measured, mine, trained[0]["quick"])]
        if log == "journey":
            parts.append("### Goals\n\n" + "\n".join(goals(mine, baselines)))
        parts += [_encoders(mine, baselines), _same_flops(mine), _lengths(mine)]
        parts += [
            _table(
                mine, "tables", "Encoders whose events are as wide as LONGER's, on ids alone: items' tables of one size"
            ),
            _table(mine, "switches", "Switches of LONGER, on ids alone unless said, trained as LONGER is"),
            _validated(
                all_of_log,
                "undone",
                ("longer", UNMERGED),
                "What merging lost: LONGER on ids alone with a part of its start taken back",
            ),
            _validated(
                all_of_log,
                "tried",
                ("longer" + FEATURES, "hstu" + FEATURES, UNMERGED, "learnable queries"),
                "What else was tried: LONGER and the encoder nearest to it with the features, and switches at rates of their own",
            ),
            _widths(mine),
            _trials(all_of_log),
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


def _conditions(records: Sequence[Record], trained: Sequence[Record]) -> str:
    first = trained[0]
    cards = ", ".join(dict.fromkeys(record["hardware"] for record in trained))
    budgets = {(r["log"], r["train_requests"], r["steps"] // r["trained"]["passes"]) for r in trained}
    each = ", ".join(f"{log} {requests:,} requests in {steps:,} steps" for log, requests, steps in sorted(budgets))
    done = {record.get("key") for record in records}
    left_out = {r["left_out"]: r["why"] for r in records if "left_out" in r and r["left_out"] not in done}
    lines = [
        f"- hardware: {cards}; torch {first['torch']}{'; quick sizes' if first['quick'] else ''}",
        f"- a pass: the newest requests ({each}); bfloat16 on a GPU",
        "- learning rates of tables and of dense layers, and the number of passes (up to 3): as each encoder with and without the "
        "features validated best, LONGER's for all of its variants; below are the trials; without them, the defaults",
        "- ± is half of the range between seeds; no ± means one seed",
        "- FLOPs: counted, forward, of the test request with the longest history and the mean number of candidates, masked pairs "
        "included; keys of items (TWIN) and vectors of users (the frozen tower), which can be computed before, are counted, and of "
        "the tower's last layer every event, though one is read",
        _STARTS,
    ]
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


def _validated(mine: Sequence[Record], group: str, beside: Sequence[str], title: str) -> str:
    """A group that is seen on the validation split alone, as all that steers the study, beside these arms as they are."""
    chosen = [r for r in mine if r.get("group") == group]
    as_it_is = [r for r in mine if r.get("arm") in beside and r.get("seed") == 0]
    if not chosen:
        return ""
    lines = [f"### {title}; validation split, one seed", "", "| arm | AUC | AUC, long histories |", "|---|---|---|"]
    lines += [f"| {r['arm']} | {r['valid']['auc']:.4f} | {r['valid']['long_auc']:.4f} |" for r in [*as_it_is, *chosen]]
    return "\n".join(lines)


def _trials(mine: Sequence[Record]) -> str:
    """How each encoder is trained, and what that validated at."""
    chains: dict[str, list[Record]] = {}
    for record in mine:
        if record.get("group") == "tuning":
            chains.setdefault(record["encoder"] + FEATURES * record["features"], []).append(record)
    if not chains:
        return ""
    lines = ["### Trials, on the validation split, one seed", ""]
    lines += ["| encoder | best: tables, dense, passes | AUC | one pass | trials |", "|---|---|---|---|---|"]
    for name, records in chains.items():
        best = max(records, key=_valid_auc)
        once = max(_valid_auc(record) for record in records if record["trained"]["passes"] == 1)
        tables, dense, passes = best["trained"].values()
        lines.append(
            f"| {name} | {tables:g}, {dense:g}, {passes} | {_valid_auc(best):.4f} | {once:.4f} | {len(records)} |"
        )
    return "\n".join(lines)


def _valid_auc(record: Record) -> float:
    return record["valid"]["auc"]


def _encoders(mine: Sequence[Record], baselines: dict[str, dict[str, float]]) -> str:
    chosen = by_arm(record for record in mine if record["group"] == "encoders")
    if not chosen:
        return ""
    rows = [_row(arm, records) for arm, records in sorted(chosen.items(), key=lambda item: -mean(item[1], auc))]
    rows += [f"| {name} | {v['auc']:.4f} | {v['long_auc']:.4f} | | | | | | | |" for name, v in baselines.items()]
    return (
        "### Encoders, each at its best of at most three passes, with and without the interaction features\n\n"
        + "\n".join([*_HEADER, *rows])
    )


def _same_flops(mine: Sequence[Record]) -> str:
    """Arms on ids that cost no more than LONGER does, best first."""
    arms = by_arm(
        record for record in mine if not record["features"] and record["group"] in ("encoders", "flops", "tables")
    )
    if "longer" not in arms or len(arms) < 3:
        return ""
    most = mega_flops(arms["longer"][0]) * _SAME_FLOPS
    within = [(arm, records) for arm, records in arms.items() if mega_flops(records[0]) <= most]
    rows = [_row(arm, records) for arm, records in sorted(within, key=lambda item: -mean(item[1], auc))]
    beyond = [_row(arm, records) for arm, records in arms.items() if mega_flops(records[0]) > most]
    more = ["", "At more FLOPs:", "", *_HEADER, *beyond] if beyond else []
    return f"### At matched FLOPs, on ids alone (up to {most:,.0f} MFLOPs)\n\n" + "\n".join([*_HEADER, *rows, *more])


def _table(mine: Sequence[Record], group: str, title: str) -> str:
    """A group's arms beside LONGER as it is."""
    chosen = by_arm(record for record in mine if record["group"] == group)
    if not chosen:
        return ""
    as_it_is = {name: records for name, records in by_arm(mine).items() if name == "longer"}
    return f"### {title}\n\n" + "\n".join([*_HEADER, *(_row(*item) for item in (as_it_is | chosen).items())])


def _lengths(mine: Sequence[Record]) -> str:
    curves = {features: curve(mine, features) for features in (False, True)}
    lengths = sorted({length for found in curves.values() for length in found})
    if len(lengths) < 2:
        return ""
    lines = [
        "### LONGER by history length",
        "",
        "The features are counted in the same window of L events, and up to a stride more: what the sequence adds is the last "
        "columns' difference.",
        "",
        "| L | ids | ids, long histories | features | features, long histories | features alone | features alone, long histories |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = [curves[False], curves[True], curve(mine, True, "none")]
    for length in lengths:
        cells = [with_spread(found.get(length, []), value) for found in columns for value in (auc, long_auc)]
        lines.append(f"| {length} | {' | '.join(cells)} |")
    for features, found in curves.items():
        name = "with features" if features else "ids"
        lines += _fit(f"{name}, long histories, by length", found, [mean(r, long_auc) for r in found.values()], "L")
    ids = curves[False]
    flops = [mega_flops(records[0]) for records in ids.values()]
    lines += _fit(
        "ids, long histories, by forward MFLOPs of those lengths",
        flops,
        [mean(r, long_auc) for r in ids.values()],
        "MFLOPs",
    )
    return "\n".join(lines)


def _widths(mine: Sequence[Record]) -> str:
    chosen = by_arm(record for record in mine if record["group"] == "widths")
    chosen |= {name: records for name, records in by_arm(mine).items() if name in ("longer", "K=4 D=256", "K=4 D=512")}
    if len(chosen) < 2:
        return ""
    arms = sorted(chosen.items(), key=lambda item: item[1][0]["dense_parameters"])
    size = [records[0]["dense_parameters"] for _, records in arms]
    fit = _fit("ids, all histories, by dense parameters", size, [mean(records, auc) for _, records in arms], "P")
    return "### LONGER by width, on ids alone\n\n" + "\n".join([*_HEADER, *(_row(*arm) for arm in arms), *fit])


def _fit(name: str, x: Iterable[float], y: Sequence[float], symbol: str) -> list[str]:
    x = list(x)
    if len(x) < 5:
        return []
    alpha, beta, gamma, r2 = power_law(x, y)
    told = f"{name}: AUC = {alpha:.4g} * {symbol}^{beta:.3g} + {gamma:.4g}, R² = {r2:.4f} ({len(x)} points)"
    return [
        "",
        told + ("; no power law: the exponent is the last one tried" if abs(beta) > MOST_EXPONENT / 1.01 else ""),
    ]


def _row(arm: str, records: Sequence[Record]) -> str:
    first = records[0]
    cells = (
        arm,
        with_spread(records, auc),
        with_spread(records, long_auc),
        f"{mean(records, gauc):.4f}",
        f"{mean(records, lambda r: r['test']['logloss']):.4f}",
        f"{first['dense_parameters']:,}",
        f"{first['table_parameters']:,}",
        f"{mega_flops(first):,.0f}" if mega_flops(first) >= 10 else f"{mega_flops(first):.2g}",
        f"{first['trained']['passes']}",
        f"{mean(records, lambda r: r['train_s']):.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _summary(trained: Sequence[Record], log: str) -> dict[str, Any]:
    """Of the first log: AUC of every encoder and of LONGER by length, and the widest spread between seeds of an encoder."""
    mine = [record for record in trained if record["log"] == log]
    arms = by_arm(record for record in mine if record["group"] == "encoders")
    return {
        "auc": {arm: mean(records, auc) for arm, records in arms.items()},
        "auc_by_length": {length: mean(records, auc) for length, records in curve(mine, True).items()},
        "spread": max((spread(records, auc) for records in arms.values() if len(records) > 1), default=None),
    }
