"""The study's goals against its records: each a line that says met, missed or not measured, with the figures that say so.

A lead counts where it is beyond both arms' spreads of seeds together and the interval over users does not hold 0. What rests on
fewer than three seeds of an arm is not measured.
"""

from collections.abc import Sequence
from itertools import pairwise

from benchmarks.quality_study.arms import ENCODERS, FEATURES, ITSELF, UNMERGED
from benchmarks.quality_study.draws import lead
from benchmarks.quality_study.grid import LENGTHS, SHORT
from benchmarks.quality_study.rows import (
    Record,
    Value,
    auc,
    by_arm,
    curve,
    long_auc,
    mean,
    mega_flops,
    spread,
    with_spread,
)

_SEEDS = 3
_LITTLE = 0.005
_NO_WORSE = 0.002


def goals(mine: Sequence[Record], baselines: dict[str, dict[str, float]]) -> list[str]:
    """Of the Complete Journey's records; what was not trained is said."""
    arms = {name: records for name, records in by_arm(mine).items() if len(records) >= _SEEDS}
    return [
        *(_beats_all(arms, baselines, ours, features) for ours in ("longer", UNMERGED) for features in (True, False)),
        *(_grows(mine, features) for features in (True, False)),
        _queries_in_order(arms),
        *(_part_of_the_queries(arms, features) for features in (False, True)),
        _merging(arms),
        _short_then_long(arms),
    ]


def leads_of(
    arms: dict[str, list[Record]], ours: Sequence[Record], suffix: str
) -> dict[str, tuple[float, float, tuple[float, float]]]:
    """By how much LONGER leads each other encoder on long histories, both spreads, and the interval over users."""
    found = {}
    for name in ENCODERS:
        if theirs := arms.get(name + suffix):
            noise = spread(ours, long_auc) + spread(theirs, long_auc)
            found[name] = mean(ours, long_auc) - mean(theirs, long_auc), noise, lead(ours, theirs)
    return found


def _how(features: bool) -> str:
    return "with features" if features else "on ids"


def _line(met: bool, claim: str, figures: str) -> str:
    return f"- **{'met' if met else 'missed'}**: {claim}: {figures}"


def _not_measured(claim: str, missing: Sequence[str]) -> str:
    return f"- not measured: {claim}; fewer than {_SEEDS} seeds of {', '.join(missing)}"


def _missing(arms: dict[str, list[Record]], names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in arms]


def _beats_all(arms: dict[str, list[Record]], baselines: dict[str, dict[str, float]], name: str, features: bool) -> str:
    """Of LONGER as it is, or without merging and trained alike; an arm without intervals is not compared."""
    arms = {arm: records for arm, records in arms.items() if all("long_auc_draws" in record for record in records)}
    suffix, unmerged = FEATURES * features, " without merging (K = 1)" * (name == UNMERGED)
    claim = f"on long histories LONGER{unmerged} beats every encoder and count_all, {_how(features)}"
    missing = _missing(arms, [name + suffix, *(other + suffix for other in ENCODERS)])
    if missing or not baselines:
        return _not_measured(claim, [f"{arm} with intervals over users" for arm in missing] or ["the baselines"])
    ours = arms[name + suffix]
    leads = leads_of(arms, ours, suffix)
    count_all = baselines["count_all"]
    leads["count_all"] = mean(ours, long_auc) - count_all["long_auc"], spread(ours, long_auc), lead(ours, [count_all])
    told = [
        f"{name} {by:+.4f} (spreads {noise:.4f}, users {low:+.4f} to {high:+.4f})"
        for name, (by, noise, (low, high)) in sorted(leads.items(), key=lambda item: item[1][0])
    ]
    beaten = all(by > noise and low > 0 for by, noise, (low, _) in leads.values())
    return _line(beaten, claim, f"{mean(ours, long_auc):.4f}; leads: {', '.join(told)}")


def _grows(mine: Sequence[Record], features: bool) -> str:
    claim = f"AUC on long histories grows with L, {_how(features)}"
    found = {length: records for length, records in curve(mine, features).items() if len(records) >= _SEEDS}
    if missing := [f"L={length}" for length in LENGTHS if length not in found]:
        return _not_measured(claim, missing)
    steps = [
        (short, long, *_difference(found[long], found[short], long_auc)) for short, long in pairwise(sorted(found))
    ]
    falls = [f"{short} to {long} loses {-by:.4f}" for short, long, by, noise in steps if by < -noise]
    flat = [f"{short} to {long} {by:+.4f} is within the spread" for short, long, by, noise in steps if abs(by) <= noise]
    means = {length: mean(records, long_auc) for length, records in found.items()}
    ends = f"{min(means)} events {means[min(means)]:.4f}, {max(means)} events {means[max(means)]:.4f}"
    return _line(not falls and not flat, claim, "; ".join([ends, *falls, *flat]))


def _difference(ours: Sequence[Record], theirs: Sequence[Record], value: Value) -> tuple[float, float]:
    return mean(ours, value) - mean(theirs, value), spread(ours, value) + spread(theirs, value)


def _queries_in_order(arms: dict[str, list[Record]]) -> str:
    claim = "recent queries > uniform > learnable"
    names = ("longer", "uniform queries", "learnable queries", "recent_uniform queries")
    if missing := _missing(arms, names):
        return _not_measured(claim, missing)
    told = ", ".join(f"{name} {mean(arms[name], auc):.4f} ± {spread(arms[name], auc):.4f}" for name in names)
    steps = [_difference(arms[ours], arms[theirs], auc) for ours, theirs in pairwise(names[:3])]
    return _line(all(by > noise for by, noise in steps), claim, told)


def _part_of_the_queries(arms: dict[str, list[Record]], features: bool) -> str:
    """As in the paper, 100 of 250 groups that are all of the history; on ids what is known of longer ones is told too."""
    claim = f"100 queries keep more than 95% of the gain of 250 at about half of the FLOPs, {_how(features)}"
    suffix = FEATURES * features
    pairs = [("longer L=1000" + suffix, "k=250 L=1000" + suffix, "all 250 groups of 1,000 events")]
    if not features:
        pairs += [
            ("longer", "k=250", "250 of 1,000 groups"),
            ("longer", "k=1000", "all 1,000 groups of 4,000 events"),
        ]
    none, itself = "none L=1000" + suffix if features else "none", ITSELF + suffix
    some, every, _ = pairs[0]
    if missing := _missing(arms, (some, every, none, itself)):
        return _not_measured(claim, missing)
    whole, noise = _difference(arms[every], arms[none], auc)
    if whole <= noise:
        return _line(False, claim, f"there is no gain to keep: {whole:+.4f}, spreads {noise:.4f}")
    told = []
    for part, all_of_it, what in pairs:
        if not _missing(arms, (part, all_of_it)):
            kept, cost, of_history = _shares(*(arms[name] for name in (part, all_of_it, none, itself)))
            told.append(f"of {what} {kept:.1%} at {cost:.0%} of the FLOPs ({of_history:.0%} of a history's)")
    lost, noise = _difference(arms[every], arms[some], auc)
    told.append(f"of {whole:+.4f} are lost {lost:+.4f}, {'within' if lost <= noise else 'more than'} the spreads")
    kept, cost, _ = _shares(*(arms[name] for name in (some, every, none, itself)))
    return _line(kept > 0.95 and cost <= 0.6, claim, "; ".join(told))


def _shares(
    part: Sequence[Record], whole: Sequence[Record], none: Sequence[Record], itself: Sequence[Record]
) -> tuple[float, float, float]:
    """What a part has of a whole's gain over none, of its FLOPs, and of those that candidates do not make by themselves."""
    gain, of_gain = (_difference(records, none, auc)[0] for records in (part, whole))
    flops, of_flops, own = (mega_flops(records[0]) for records in (part, whole, itself))
    return gain / of_gain, flops / of_flops, (flops - own) / (of_flops - own)


def _merging(arms: dict[str, list[Record]]) -> str:
    claim = f"merging loses little on ids alone (within {_LITTLE} of K = 1 trained alike, spreads and all)"
    if missing := _missing(arms, ("longer", UNMERGED)):
        return _not_measured(claim, missing)
    found = {k: arms[name] for k, name in ((1, UNMERGED), (2, "K=2"), (4, "longer"), (8, "K=8")) if name in arms}
    told = ", ".join(
        f"K={k} {mean(records, auc):.4f} ± {spread(records, auc):.4f} ({mega_flops(records[0]):,.0f} MFLOPs)"
        for k, records in found.items()
    )
    by, noise = _difference(found[4], found[1], auc)
    return _line(by - noise > -_LITTLE, claim, told)


def _short_then_long(arms: dict[str, list[Record]]) -> str:
    claim = f"trained on shorter histories, LONGER scores longer ones no worse (by {_NO_WORSE}) than those that it was trained on"
    names = [f"trained at L={length}, tested at {LENGTHS[-1]}" for length in SHORT]
    if missing := _missing(arms, [*names, *(f"longer L={length}" for length in SHORT)]):
        return _not_measured(claim, missing)
    pairs = [(arms[f"longer L={arms[name][0]['length']}"], arms[name]) for name in names]
    told = "; ".join(
        f"trained at {same[0]['length']}: {with_spread(same, auc)} there, {with_spread(longer, auc)} at the whole length"
        for same, longer in pairs
    )
    return _line(all(mean(longer, auc) - mean(same, auc) > -_NO_WORSE for same, longer in pairs), claim, told)
