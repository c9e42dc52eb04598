"""Trials on the validation split before the grid: how each encoder is trained, at the study's own number of steps."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.quality_study.arms import ENCODERS, FEATURES, ITSELF, Arm, Trained
from benchmarks.quality_study.grid import GENERATED_ENCODERS
from benchmarks.quality_study.rows import Record

Chain = tuple[str, bool]
"""An encoder, and whether it has the interaction features."""


@dataclass(frozen=True)
class Search:
    """What is tried first, and then, until the best of all has been tried between its neighbours: `beyond`."""

    tables: tuple[float, ...] = (0.01, 0.003, 0.03)
    beyond: tuple[float, ...] = (0.001, 0.0003, 0.1)
    dense: tuple[float, ...] = (0.0006, 0.006)
    dense_beyond: tuple[float, ...] = (0.0002, 0.02)
    passes: int = 3
    worth: float = 0.001
    """AUC that one more pass must have gained for the next to be tried."""


SEARCH = Search()


def chains(log: str) -> list[Chain]:
    """On ids alone, where the sequence is all there is, then with the features; the features alone have no other chain.

    The generated log's encoders have trials on ids only, but for LONGER and the features alone.
    """
    if log == "generated":
        return [*((name, False) for name in GENERATED_ENCODERS if name != "none"), ("none", True), ("longer", True)]
    with_sequence = ["longer", *(name for name in ENCODERS if name != "none")]
    return [*((name, False) for name in with_sequence), ("none", True), *((name, True) for name in with_sequence)]


def runnable(log: str, chain: Chain, search: Search, records: Sequence[Record]) -> list[Arm]:
    """The trials of a chain whose turn it is: all of one stage that have no record; none at the chain's end or before its turn.

    First the rates of tables, then of dense layers, then more passes, each at the best of what was tried before. A chain with the
    features comes after the rates on ids, has that of dense layers, and tries the rates of tables around the best one there.
    """
    encoder, features = chain
    on_ids: dict[Trained, float] = {}
    if features and encoder != "none":
        on_ids = _tried(records, log, (encoder, False))
        if not on_ids or any(_is_rate(trial) for trial in runnable(log, (encoder, False), search, records)):
            return []
    tried = _tried(records, log, chain)
    for stage in _stages(search, tried, on_ids):
        if missing := [each for each in stage if each not in tried]:
            return [_arm(log, chain, each) for each in missing]
    return []


def _stages(search: Search, tried: dict[Trained, float], on_ids: dict[Trained, float]) -> Iterator[list[Trained]]:
    """What is tried, stage by stage; each begins when the one before has been tried."""

    def found(**same: float) -> list[Trained]:
        """Trials of one pass with these values, best first."""
        fits = [each for each in tried if each.passes == 1 and same.items() <= asdict(each).items()]
        return sorted(fits, key=lambda each: -tried[each])

    start = replace(max(on_ids, key=lambda each: on_ids[each]), passes=1) if on_ids else Trained()
    rates = sorted({*search.tables, *search.beyond})
    yield [replace(start, tables=rate) for rate in (_around(start.tables, rates) if on_ids else search.tables)]
    for _ in rates:
        yield [replace(start, tables=rate) for rate in _around(found(dense=start.dense)[0].tables, rates)]
    if not on_ids:
        start = found(dense=start.dense)[0]
        rates = sorted({start.dense, *search.dense, *search.dense_beyond})
        yield [replace(start, dense=rate) for rate in search.dense]
        for _ in rates:
            yield [replace(start, dense=rate) for rate in _around(found(tables=start.tables)[0].dense, rates)]
    once = found()[0]
    for passes in range(2, search.passes + 1):
        yield [replace(once, passes=passes)]
        if tried[replace(once, passes=passes)] < tried[replace(once, passes=passes - 1)] + search.worth:
            return


def _around(rate: float, rates: Sequence[float]) -> list[float]:
    """Itself and its neighbours."""
    place = rates.index(rate)
    return [rate, *rates[max(0, place - 1) : place], *rates[place + 1 : place + 2]]


def _arm(log: str, chain: Chain, trial: Trained) -> Arm:
    encoder, features = chain
    told = f"{encoder}{FEATURES * features} tables {trial.tables:g} dense {trial.dense:g} passes {trial.passes}"
    return Arm(told, log, "tuning", 0, encoder=encoder, features=features, trial=trial)


def _tried(records: Iterable[Record], log: str, chain: Chain) -> dict[Trained, float]:
    """What each trial of a chain validated at."""
    return {
        Trained(**record["trained"]): record["valid"]["auc"]
        for record in records
        if record.get("group") == "tuning" and (record["log"], record["encoder"], record["features"]) == (log, *chain)
    }


def chosen(records: Sequence[Record], arm: Arm) -> Trained:
    """How an arm of the grid is trained: as its encoder validated best, with the same features if there are such trials."""
    encoder = _tuned_as(arm)
    for features in (arm.features, not arm.features):
        if tried := _tried(records, arm.log, (encoder, features)):
            best = max(tried, key=lambda each: tried[each])
            return replace(best, passes=best.passes + arm.more_passes)
    return Trained()


def stands(record: Record, records: Sequence[Record], arm: Arm) -> bool:
    """Whether an arm's record is of how its encoder is trained by these trials: a search that went on may have found better."""
    return record["trained"] == asdict(arm.trial or chosen(records, arm))


def waits(arm: Arm, trials: Iterable[Arm]) -> bool:
    """Whether one of these trials may change how an arm of the grid is trained: one of its own chain or, with the features, of a
    rate on ids, where that chain begins."""
    mine = (trial for trial in trials if (trial.log, trial.encoder) == (arm.log, _tuned_as(arm)))
    return any(
        trial.features == arm.features or trial.encoder == "none" or (arm.features and _is_rate(trial))
        for trial in mine
    )


def _is_rate(trial: Arm) -> bool:
    """Of rates, not of passes."""
    return trial.trial is not None and trial.trial.passes == 1


def _tuned_as(arm: Arm) -> str:
    return "longer" if arm.encoder == ITSELF else arm.encoder


def num_trials(records: Sequence[Record], log: str, chain: Chain) -> int:
    return len(_tried(records, log, chain))
