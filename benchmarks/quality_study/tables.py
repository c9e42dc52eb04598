"""Tables of the study's page: what was tested, by encoder, cost, length and width."""

from collections.abc import Iterable, Sequence

from benchmarks.quality_study.rows import (
    MOST_EXPONENT,
    Record,
    auc,
    by_arm,
    curve,
    frontier,
    gauc,
    long_auc,
    mean,
    mega_flops,
    power_law,
    with_spread,
)

_SAME_FLOPS = 1.25
_HELD_OUT = 2
_HEADER = (
    "| arm | AUC | AUC, long histories | GAUC | log loss | dense parameters | table parameters | MFLOPs | passes | train s |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def encoders(mine: Sequence[Record], baselines: dict[str, dict[str, float]]) -> str:
    chosen = by_arm(record for record in mine if record["group"] == "encoders")
    if not chosen:
        return ""
    rows = [_row(arm, records) for arm, records in sorted(chosen.items(), key=lambda item: -mean(item[1], auc))]
    rows += [f"| {name} | {v['auc']:.4f} | {v['long_auc']:.4f} | | | | | | | |" for name, v in baselines.items()]
    return (
        "### Encoders, each at its best of at most three passes, with and without the interaction features\n\n"
        + "\n".join([*_HEADER, *rows])
    )


def same_flops(mine: Sequence[Record]) -> str:
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


def frontiers(mine: Sequence[Record]) -> str:
    """Who is best at what a request may cost."""
    lines = []
    for features in (False, True):
        arms = by_arm(record for record in mine if record["features"] == features)
        if len(arms) > 3:
            found = (
                f"{name} ({mega_flops(arms[name][0]):,.3g}: {with_spread(arms[name], long_auc)})"
                for name in frontier(arms, long_auc)
            )
            lines.append(f"- {'with features' if features else 'on ids'}: {'; '.join(found)}")
    if not lines:
        return ""
    title = "### The frontier: arms that none is better than at no more MFLOPs, on long histories (MFLOPs: AUC)"
    return "\n".join([title, "", *lines])


def table(mine: Sequence[Record], group: str, title: str) -> str:
    """A group's arms beside LONGER as it is."""
    chosen = by_arm(record for record in mine if record["group"] == group)
    if not chosen:
        return ""
    as_it_is = {name: records for name, records in by_arm(mine).items() if name == "longer"}
    return f"### {title}\n\n" + "\n".join([*_HEADER, *(_row(*item) for item in (as_it_is | chosen).items())])


def lengths(mine: Sequence[Record]) -> str:
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


def widths(mine: Sequence[Record]) -> str:
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
    miss = max(abs(alpha * at**beta + gamma - found) for at, found in zip(x, y, strict=True))
    told = f"{name}: AUC = {alpha:.4g} * {symbol}^{beta:.3g} + {gamma:.4g}, R² = {r2:.4f}"
    told += f" ({len(x)} points), misses by {miss:.4f} at most"
    if abs(beta) > MOST_EXPONENT / 1.01:
        told += "; no power law: the exponent is the last one tried"
    elif len(x) >= 5 + _HELD_OUT:
        pairs = sorted(zip(x, y, strict=True))
        alpha, beta, gamma, _ = power_law(*zip(*pairs[:-_HELD_OUT], strict=True))
        at, found = pairs[-1]
        told += f". Fitted without the last {_HELD_OUT} points it gives {alpha * at**beta + gamma:.4f} for the last, {found:.4f}"
    return ["", told]


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
