"""Which arms the study trains of each log, most important first."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from benchmarks.quality_study.arms import BASES, ENCODERS, FEATURES, ITSELF, UNDO, UNMERGED, Arm, Trained

GENERATED_ENCODERS = ("longer", "none", "din_recent50", "sim_hard", "sim_soft", "din", "twin")
"""Those whose cost at 10,000 events is linear, and small enough."""
GROUPS = ("encoders", "lengths", "tried", "flops", "tables", "widths", "switches", "undone")
"""The tables and plots that arms are for, in the order in which they are worth their time."""
LENGTHS = (20, 50, 100, 200, 500, 1000, 2000, 4000)
_QUERIES = ("uniform", "learnable", "recent_uniform")
SHORT = (2000, 1000, 500)
OF_GOALS = (
    UNMERGED,
    UNMERGED + FEATURES,
    *(f"{kind} queries" for kind in _QUERIES),
    "k=250 L=1000",
    "k=250 L=1000" + FEATURES,
    *(f"trained at L={length}, tested at {LENGTHS[-1]}" for length in SHORT),
)
"""Switches of LONGER that a goal rests on."""

_LATER = tuple(name + FEATURES for name in GENERATED_ENCODERS if name not in ("longer", "none"))
"""Of the generated log, which is there for what ids tell: one seed, trained as on ids."""


def turn(arm: Arm) -> tuple[int, int, int]:
    """Encoders and lengths of every log come first, then the switches that goals rest on, then the rest group by group, all of one
    seed before the next."""
    if arm.group in ("encoders", "lengths") and not (arm.log == "generated" and arm.name in _LATER):
        return 0, 0, 0
    return (1, 0, 0) if arm.name in OF_GOALS else (2, arm.seed, GROUPS.index(arm.group))


def grid(log: str, quick: bool, seeds: int) -> list[Arm]:
    """All arms of a log in the order in which they are worth their time; a block's seeds come one round each."""
    if quick:
        return _quick(log)
    make = {"journey": _journey, "movielens": _movielens, "generated": _generated}[log]
    return list(make(seeds))


def _quick(log: str) -> list[Arm]:
    """What the study is about, as far as two cores show it in minutes: encoders that are cheap at this length, LONGER by length, an
    arm without merging and one of other queries."""
    ids = Arm("", log, "encoders", 0, features=False)
    if log == "movielens":
        return _both(replace(ids, features=True), ("longer", "none", "din"))
    longer = replace(ids, name="longer")
    of_features = [replace(ids, name=name + FEATURES, encoder=name, features=True) for name in ("longer", "none")]
    encoders = [replace(ids, name=name, encoder=name) for name in ("none", "sum_pooling", "din_recent50", "twin")]
    switches = replace(longer, group="switches")
    switched = [
        replace(switches, name=UNMERGED, merge=1, queries=100),
        replace(switches, name="uniform queries", model={"queries": "uniform"}),
    ]
    lengths = _lengths(ids, (50, 200, 500) if log == "journey" else (50, 100, 200, 400))
    if log == "generated":  # where features would count what is planted
        lengths = [arm for arm in lengths if not arm.features]
    return [*of_features, longer, *encoders, *lengths, *switched]


def _rounds(seeds: int, arms: list[Arm]) -> Iterator[Arm]:
    for seed in range(seeds):
        yield from (replace(arm, seed=seed) for arm in arms)


def _both(base: Arm, names: Iterable[str]) -> list[Arm]:
    """These encoders with the interaction features, then on ids alone."""
    return [
        replace(base, name=name + FEATURES * features, encoder=name, features=features)
        for features in (True, False)
        for name in names
    ]


def _journey(seeds: int) -> Iterator[Arm]:
    base = Arm("", "journey", "encoders", 0)
    encoders = _both(base, ("longer", *ENCODERS, ITSELF))
    yield from _rounds(seeds, encoders)
    yield from _rounds(seeds, _lengths(base, LENGTHS))
    yield from _rounds(seeds, _flops(base))
    yield from _rounds(seeds, _tables(base))
    ids_only = replace(base, group="switches", features=False)
    switches = [*_merging(ids_only), *_queries(ids_only), *_sizes(ids_only)]
    yield from _rounds(seeds, [arm for arm in switches if arm.name in OF_GOALS])
    yield from _rounds(seeds, [arm for arm in switches if arm.name not in OF_GOALS])
    yield from _tried(base)
    yield from _undone(ids_only)


def _merging(here: Arm) -> list[Arm]:
    """At the same width D of a token, where an event of K = 8 has an eighth, and, as in the paper, at the same width d of an event.

    At d = 32, K = 4 is LONGER as it is; at d = 64, K = 2 is "K=2"; at d = 128, K = 1 is "K=1".
    """
    of_tokens = [
        replace(here, name=UNMERGED, merge=1, queries=400),
        replace(here, name="K=2", merge=2, queries=200),
        replace(here, name="K=8", merge=8, queries=50),
    ]
    of_events = [
        replace(here, name="K=1 D=32", merge=1, queries=400, model={"width": 32}),
        replace(here, name="K=2 D=64", merge=2, queries=200, model={"width": 64}),
        replace(here, name="K=8 D=256", merge=8, queries=50, model={"width": 256}),
        replace(here, name="K=4 D=256", model={"width": 256}),
        replace(here, name="K=4 D=512", model={"width": 512}),
    ]
    plain = {"inner_transformer": False}
    no_inner = [
        replace(here, name="K=2 no InnerTrans", merge=2, queries=200, model=plain),
        replace(here, name="K=4 no InnerTrans", model=plain),
        replace(here, name="K=8 no InnerTrans", merge=8, queries=50, model=plain),
    ]
    counted = [replace(arm, name=arm.name + FEATURES, features=True) for arm in of_tokens]
    return of_tokens + of_events + no_inner + counted


def _queries(here: Arm) -> list[Arm]:
    """Which groups are queries, and how many, as in the paper's Table 2."""
    kinds = [replace(here, name=f"{kind} queries", model={"queries": kind}) for kind in _QUERIES]
    numbers = [replace(here, name=f"k={k}", queries=k) for k in (12, 25, 50, 250, 1000)]
    whole = replace(here, name="k=250 L=1000", queries=250, length=1000)  # all of 250, as in the paper
    return [*kinds, *numbers, whole, replace(whole, name=whole.name + FEATURES, features=True)]


def _flops(base: Arm) -> list[Arm]:
    """Encoders that cost more than LONGER, on as much history as costs what LONGER does at its whole length; then on more."""
    here = replace(base, group="flops", features=False)
    sizes = (
        ("din", 700),
        ("transformer", 400),
        ("hstu", 500),
        ("user_embedding", 280),
        ("transformer", 1000),
        ("hstu", 2000),
    )
    return [replace(here, name=f"{name} L={length}", length=length, encoder=name) for name, length in sizes]


def _tables(base: Arm) -> list[Arm]:
    """Encoders whose events are as wide as LONGER's, d = D/K: no table knows more of an item than another."""
    here, d = replace(base, group="tables", features=False), BASES["journey"].width // base.merge
    names = [name for name in ENCODERS if name not in ("none", "din_recent50")]
    return [replace(here, name=f"{name} d={d}", encoder=name, model={"width": d}) for name in names]


def _undone(here: Arm) -> list[Arm]:
    """What merging lost, one cause at a time."""
    here = replace(here, group="undone")
    every = [replace(here, name=f"K={k}, {what}", undone=what, merge=k) for k in (4, 1) for what in UNDO]
    return [replace(arm, queries=400) if arm.merge == 1 else arm for arm in every]


def _tried(base: Arm) -> list[Arm]:
    """What might part LONGER from the encoders nearest to it, with the features (passes beyond the budget too), and switches at
    other rates than LONGER's own best (0.01, 0.0006): by the validation split alone."""
    here = replace(base, group="tried")
    both = [replace(here, name=name, encoder=name) for name in ("longer", "hstu")]
    dropped = [
        replace(arm, name=f"{arm.name}+features dropout {p}", model={"dropout": p}) for arm in both for p in (0.1, 0.2)
    ]
    sizes = {"N=2": {"num_self_layers": 2}, "D=192": {"width": 192}}
    larger = [replace(both[0], name=f"longer+features {name}", model=model) for name, model in sizes.items()]
    passes = [
        replace(here, name=f"{name}+features, {more} more", encoder=name, more_passes=more)
        for name in ("longer", "hstu", "transformer")
        for more in (1, 2)
    ]
    ids_only = replace(here, features=False)
    switched = (
        replace(ids_only, name=UNMERGED, merge=1, queries=400),
        replace(ids_only, name="learnable queries", model={"queries": "learnable"}),
    )
    rates = (Trained(0.003, 0.0006, 3), Trained(0.03, 0.0006, 3), Trained(0.01, 0.002, 3))
    at_rates = [
        replace(arm, name=f"{arm.name} tables {rate.tables:g} dense {rate.dense:g}", trial=rate)
        for arm in switched
        for rate in rates
    ]
    return [*dropped, *larger, *passes, *at_rates]


def _sizes(here: Arm) -> list[Arm]:
    trained = [
        replace(here, name=f"trained at L={length}, tested at {LENGTHS[-1]}", length=length, score_length=LENGTHS[-1])
        for length in SHORT
    ]
    widths = [replace(here, name=f"D={w}", group="widths", model={"width": w}) for w in (32, 64, 96, 192)]
    layers = [replace(here, name=f"N={n}", model={"num_self_layers": n}) for n in (0, 2)]
    return [*trained, *widths, *layers, replace(here, name="paper's encoding", model={"encoding": "paper"})]


def _lengths(here: Arm, lengths: tuple[int, ...]) -> list[Arm]:
    """LONGER by length, and the features alone, which are counted in the same window: what the sequence adds at each length."""
    here = replace(here, group="lengths")
    return [
        replace(here, name=f"{name} L={length}{FEATURES * features}", length=length, features=features, encoder=name)
        for name, features in (("longer", True), ("none", True), ("longer", False))
        for length in lengths[:-1]
    ]


def _movielens(seeds: int) -> Iterator[Arm]:
    base = Arm("", "movielens", "encoders", 0)
    ids = replace(base, features=False)
    lengths = [replace(ids, name=f"longer L={n}", group="lengths", length=n) for n in (20, 50, 100, 200, 500)]
    yield from _rounds(seeds, _both(base, ("longer", *ENCODERS, ITSELF)) + lengths)


def _generated(seeds: int) -> Iterator[Arm]:
    base = Arm("", "generated", "lengths", 0, features=False)
    lengths = (100, 200, 500, 1000, 2000, 3000, 4000, 6000)
    ids = [replace(base, name=f"longer L={length}", length=length) for length in reversed(lengths)]
    counted = [replace(arm, name=arm.name + FEATURES, features=True) for arm in (ids[2], ids[5])]
    encoders = [replace(base, name=name, group="encoders", encoder=name) for name in GENERATED_ENCODERS]
    with_features = [replace(arm, name=arm.name + FEATURES, features=True) for arm in encoders]
    encoders += with_features[:2]
    sizes = [replace(base, name=f"D={w}", group="widths", model={"width": w}) for w in (32, 64, 96, 192, 256)]
    trained = replace(
        base, name="trained at L=4000, tested at 10000", group="switches", length=4000, score_length=10_000
    )
    short = replace(trained, name="trained at L=2000, tested at 10000", length=2000)
    yield from _rounds(seeds, [*encoders, *ids])
    yield from _rounds(1, [short, trained, *counted, *sizes, *with_features[2:]])
