"""The study's Markdown page from its records: means over seeds, and how far seeds lie apart."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.quality_study.arms import FEATURES
from benchmarks.quality_study.goals import goals
from benchmarks.quality_study.rows import (
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
    "| arm | AUC | AUC, long histories | GAUC | log loss | dense parameters | MFLOPs | train s |",
    "|---|---|---|---|---|---|---|---|",
)


def page(records: Sequence[Record]) -> str:
    """Goals and tables of every log that has records; the last line is JSON."""
    trained = [record for record in records if "test" in record]
    if not trained:
        return "no arm is trained yet"
    logs = sorted({record["log"] for record in trained}, key=["journey", "generated", "movielens"].index)
    parts = ["# Quality: LONGER and the encoders that it is compared with", _conditions(records, trained)]
    for log in logs:
        mine = [record for record in trained if record["log"] == log]
        baselines = next((r["baselines"] for r in records if r.get("key") == f"{log}/baselines"), {})
        parts.append(f"## {log}")
        if log == "journey":
            parts.append("### Goals\n\n" + "\n".join(goals(mine, baselines)))
        parts += [_encoders(mine, baselines), _same_flops(mine), _lengths(mine)]
        parts += [
            _table(mine, "passes", "More passes, the one that validates best"),
            _table(mine, "switches", "Switches of LONGER, on ids alone"),
            _table(mine, "undone", "What merging lost: LONGER on ids alone with a part of its start taken back"),
            _widths(mine),
        ]
    return "\n\n".join([*filter(None, parts), json.dumps(_summary(trained, logs[0]))])


def _conditions(records: Sequence[Record], trained: Sequence[Record]) -> str:
    first = trained[0]
    cards = ", ".join(dict.fromkeys(record["hardware"] for record in trained))
    rates = sorted({(r["log"], r["encoder"], r["embedding_rate"]) for r in trained if r["encoder"] != "none"})
    tuned = {(r["log"], r["encoder"]) for r in records if r.get("group") == "tuning"}
    told = ", ".join(f"{log} {encoder} {rate:g}" for log, encoder, rate in rates if (log, encoder) in tuned)
    budgets = {
        (r["log"], r["train_requests"], r["steps"]) for r in trained if r["epochs"] == 1 and r["encoder"] == "longer"
    }
    each = ", ".join(f"{log} {requests:,} requests in {steps:,} steps" for log, requests, steps in sorted(budgets))
    return "\n".join(
        [
            f"- hardware: {cards}; torch {first['torch']}{'; quick sizes' if first['quick'] else ''}",
            f"- training: one pass over the newest requests ({each}) unless an arm says more; bfloat16 on a GPU",
            f"- tables' learning rate, by AUC of the validation split on ids alone: {told or 'the default, nothing was tried'}",
            "- ± is half of the range between seeds; no ± means one seed",
            "- FLOPs: counted, forward, of one request of the longest history in the test split with its candidates",
        ]
    )


def _encoders(mine: Sequence[Record], baselines: dict[str, dict[str, float]]) -> str:
    chosen = by_arm(record for record in mine if record["group"] == "encoders")
    if not chosen:
        return ""
    rows = [_row(arm, records) for arm, records in sorted(chosen.items(), key=lambda item: -mean(item[1], auc))]
    rows += [f"| {name} | {v['auc']:.4f} | {v['long_auc']:.4f} | | | | | |" for name, v in baselines.items()]
    return "### Encoders at the same training, with and without the interaction features\n\n" + "\n".join(
        [*_HEADER, *rows]
    )


def _same_flops(mine: Sequence[Record]) -> str:
    """Arms on ids that cost no more than LONGER does, best first."""
    arms = by_arm(record for record in mine if not record["features"] and record["group"] in ("encoders", "flops"))
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
    as_it_is = {name: records for name, records in by_arm(mine).items() if name in ("longer", "longer" + FEATURES)}
    if group != "passes":
        as_it_is.pop("longer" + FEATURES, None)
    return f"### {title}\n\n" + "\n".join([*_HEADER, *(_row(*item) for item in (as_it_is | chosen).items())])


def _lengths(mine: Sequence[Record]) -> str:
    curves = {features: curve(mine, features) for features in (False, True)}
    lengths = sorted({length for found in curves.values() for length in found})
    if len(lengths) < 2:
        return ""
    lines = [
        "### LONGER by history length",
        "",
        "| L | ids | ids, long histories | features | features, long histories |",
        "|---|---|---|---|---|",
    ]
    for length in lengths:
        cells = [with_spread(curves[f].get(length, []), value) for f in (False, True) for value in (auc, long_auc)]
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
    chosen |= {name: records for name, records in by_arm(mine).items() if name in ("longer", "longer L=10000")}
    if len(chosen) < 4:
        return ""
    arms = sorted(chosen.items(), key=lambda item: item[1][0]["dense_parameters"])
    size = [records[0]["dense_parameters"] for _, records in arms]
    fit = _fit("ids, all histories, by dense parameters", size, [mean(records, auc) for _, records in arms], "P")
    return "### LONGER by width, on ids alone\n\n" + "\n".join([*_HEADER, *(_row(*arm) for arm in arms), *fit])


def _fit(name: str, x: Iterable[float], y: Sequence[float], symbol: str) -> list[str]:
    x = list(x)
    if len(x) < 4:
        return []
    alpha, beta, gamma, r2 = power_law(x, y)
    return ["", f"{name}: AUC = {alpha:.4g} * {symbol}^{beta:.3g} + {gamma:.4g}, R² = {r2:.4f} ({len(x)} points)"]


def _row(arm: str, records: Sequence[Record]) -> str:
    first = records[0]
    return (
        f"| {arm} | {with_spread(records, auc)} | {with_spread(records, long_auc)} | {mean(records, gauc):.4f} | "
        f"{mean(records, lambda r: r['test']['logloss']):.4f} | {first['dense_parameters']:,} | "
        f"{mega_flops(first):,.0f} | {mean(records, lambda r: r['train_s']):.1f} |"
    )


def _summary(trained: Sequence[Record], log: str) -> dict[str, Any]:
    """Of the first log: AUC of every encoder and of LONGER by length, and the widest spread between seeds of an encoder."""
    mine = [record for record in trained if record["log"] == log]
    arms = by_arm(record for record in mine if record["group"] == "encoders")
    return {
        "auc": {arm: mean(records, auc) for arm, records in arms.items()},
        "auc_by_length": {length: mean(records, auc) for length, records in curve(mine, True).items()},
        "spread": max((spread(records, auc) for records in arms.values()), default=None),
    }
