"""The study's goals against its records: each a line that says met, missed or not measured, with the figures that say so."""

from collections.abc import Sequence
from itertools import pairwise

from benchmarks.quality_study.arms import ENCODERS, FEATURES
from benchmarks.quality_study.rows import Record, auc, by_arm, curve, long_auc, mean, mega_flops, spread


def goals(mine: Sequence[Record], baselines: dict[str, dict[str, float]]) -> list[str]:
    """Of the Complete Journey's records; what was not trained is said."""
    arms = by_arm(mine)
    return [
        _beats_all(arms, baselines),
        *(_grows(mine, features) for features in (False, True)),
        _queries_in_order(arms),
        _part_of_the_queries(arms),
        _merging(arms),
        _short_then_long(arms),
    ]


def _line(met: bool, claim: str, figures: str) -> str:
    return f"- **{'met' if met else 'missed'}**: {claim}: {figures}"


def _beats_all(arms: dict[str, list[Record]], baselines: dict[str, dict[str, float]]) -> str:
    claim = "on long histories LONGER beats every encoder, count_all and the features alone by more than the spread"
    ours = arms.get("longer" + FEATURES)
    rivals = {name: arms[name + FEATURES] for name in ENCODERS if name + FEATURES in arms}
    if not ours or "none" not in rivals or not baselines:
        return f"- not measured: {claim}"
    own, around = mean(ours, long_auc), spread(ours, long_auc)
    leads = {name: (own - mean(found, long_auc), around + spread(found, long_auc)) for name, found in rivals.items()}
    leads["count_all"] = own - baselines["count_all"]["long_auc"], around
    behind = sorted((lead, noise, name) for name, (lead, noise) in leads.items() if lead <= noise)
    figures = f"{own:.4f} against {own - leads['none'][0]:.4f} of the features alone and {baselines['count_all']['long_auc']:.4f}"
    told = ", ".join(f"{name} (lead {lead:+.4f}, both spreads {noise:.4f})" for lead, noise, name in behind)
    missing = [name for name in ENCODERS if name not in rivals]
    if missing and not behind:
        return f"- **so far**: {claim}: {figures} of count_all; not trained: {', '.join(missing)}"
    return _line(
        not behind, claim, f"{figures} of count_all; {'not beyond the spread: ' + told if told else 'all beaten'}"
    )


def _grows(mine: Sequence[Record], features: bool) -> str:
    claim = f"AUC on long histories grows with L, {'with features' if features else 'on ids'}"
    means = {length: mean(records, long_auc) for length, records in curve(mine, features).items()}
    if len(means) < 3:
        return f"- not measured: {claim}"
    falls = [
        f"{short} to {long} loses {means[short] - means[long]:.4f}"
        for short, long in pairwise(means)
        if means[long] < means[short]
    ]
    ends = f"{min(means)} events {means[min(means)]:.4f}, {max(means)} events {means[max(means)]:.4f}"
    return _line(not falls, claim, "; ".join([ends, *falls]))


def _queries_in_order(arms: dict[str, list[Record]]) -> str:
    claim = "recent queries > uniform > learnable"
    names = ("longer", "uniform queries", "learnable queries", "recent_uniform queries")
    if any(name not in arms for name in names):
        return f"- not measured: {claim}"
    recent, uniform, learnable, mixed = (mean(arms[name], auc) for name in names)
    widest = max(spread(arms[name], auc) for name in names)
    figures = f"recent {recent:.4f}, recent and uniform {mixed:.4f}, uniform {uniform:.4f}, "
    figures += f"learnable {learnable:.4f}, widest spread {widest:.4f}"
    return _line(recent > uniform > learnable, claim, figures)


def _part_of_the_queries(arms: dict[str, list[Record]]) -> str:
    claim = "k = 100 keeps more than 95% of the gain of all groups as queries at about half of the FLOPs"
    if any(name not in arms for name in ("longer", "k=1000", "none")):
        return f"- not measured: {claim}"
    none, part, every = (mean(arms[name], auc) for name in ("none", "longer", "k=1000"))
    share = (part - none) / (every - none)
    flops = mega_flops(arms["longer"][0]) / mega_flops(arms["k=1000"][0])
    return _line(
        share > 0.95 and flops < 0.6,
        claim,
        f"{share:.1%} of the gain ({part - none:+.4f} of {every - none:+.4f}) at {flops:.0%}",
    )


def _merging(arms: dict[str, list[Record]]) -> str:
    claim = "merging loses little on ids alone (within 0.005 of K = 1)"
    found = {k: arms[name] for k, name in ((1, "K=1"), (2, "K=2"), (4, "longer"), (8, "K=8")) if name in arms}
    if 1 not in found or 4 not in found:
        return f"- not measured: {claim}"
    figures = ", ".join(
        f"K={k} {mean(records, auc):.4f} ({mega_flops(records[0]):,.0f} MFLOPs)" for k, records in found.items()
    )
    return _line(mean(found[4], auc) > mean(found[1], auc) - 0.005, claim, figures)


def _short_then_long(arms: dict[str, list[Record]]) -> str:
    claim = "trained on shorter histories, LONGER scores longer ones no worse than those that it was trained on"
    pairs = [
        (arms[f"longer L={length}"], records)
        for name, records in arms.items()
        if name.startswith("trained at L=") and f"longer L={(length := records[0]['length'])}" in arms
    ]
    if not pairs:
        return f"- not measured: {claim}"
    figures = "; ".join(
        f"trained at {same[0]['length']}: {mean(same, auc):.4f} there, {mean(longer, auc):.4f} at the whole length"
        for same, longer in pairs
    )
    return _line(all(mean(longer, auc) >= mean(same, auc) for same, longer in pairs), claim, figures)
