"""Tables of what steers the study: the validation split alone."""

from collections.abc import Sequence

from benchmarks.quality_study.arms import FEATURES
from benchmarks.quality_study.rows import Record
from benchmarks.quality_study.tuning import SEARCH

_ENDS = {
    "tables": (min(SEARCH.beyond), max(SEARCH.beyond)),
    "dense": (min(SEARCH.dense_beyond), max(SEARCH.dense_beyond)),
}


def validated(mine: Sequence[Record], group: str, beside: Sequence[str], title: str) -> str:
    """A group that is seen on the validation split alone, as all that steers the study, beside these arms as they are."""
    chosen = [r for r in mine if r.get("group") == group]
    as_it_is = [r for r in mine if r.get("arm") in beside and r.get("seed") == 0]
    if not chosen:
        return ""
    lines = [f"### {title}; validation split, one seed", "", "| arm | AUC | AUC, long histories |", "|---|---|---|"]
    lines += [f"| {r['arm']} | {r['valid']['auc']:.4f} | {r['valid']['long_auc']:.4f} |" for r in [*as_it_is, *chosen]]
    return "\n".join(lines)


def trials(mine: Sequence[Record]) -> str:
    """How each encoder is trained, and what that validated at."""
    chains: dict[str, list[Record]] = {}
    for record in mine:
        if record.get("group") == "tuning":
            chains.setdefault(record["encoder"] + FEATURES * record["features"], []).append(record)
    if not chains:
        return ""
    lines = [
        "### Trials, on the validation split, one seed",
        "",
        "The last column is where more might have changed something: a rate at the end of what is tried, or the last of "
        f"{SEARCH.passes} passes, if that one still gained {SEARCH.worth} or more.",
        "",
        "| encoder | best: tables, dense, passes | AUC | one pass | trials | stopped |",
        "|---|---|---|---|---|---|",
    ]
    for name, records in chains.items():
        best = max(records, key=_valid_auc)
        once = max(_valid_auc(record) for record in records if record["trained"]["passes"] == 1)
        tables, dense, passes = best["trained"].values()
        cells = f"{tables:g}, {dense:g}, {passes}", f"{_valid_auc(best):.4f}", f"{once:.4f}", f"{len(records)}"
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(_stopped(records, best['trained']))} |")
    return "\n".join(lines)


def _stopped(records: Sequence[Record], best: dict[str, float]) -> list[str]:
    """What the search's bounds kept a chain from."""
    told = [f"{rate} rate" for rate in ("tables", "dense") if best[rate] in _ENDS[rate]]
    found = {
        record["trained"]["passes"]: _valid_auc(record)
        for record in records
        if record["trained"] | {"passes": 0} == best | {"passes": 0}
    }
    last = found[best["passes"]] - found.get(best["passes"] - 1, 1.0)
    if best["passes"] == SEARCH.passes and last >= SEARCH.worth:
        told.append(f"passes: the last gained {last:.4f}")
    return told


def _valid_auc(record: Record) -> float:
    return record["valid"]["auc"]
