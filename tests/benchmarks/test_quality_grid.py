"""Every arm of the grid is what its name says: a table is only worth what its rows were trained as."""

import re
from collections import defaultdict
from dataclasses import replace

import pytest

from benchmarks.quality_study.arms import BASES, FEATURES, ITSELF, Arm, Trained, model_settings
from benchmarks.quality_study.grid import GENERATED_ENCODERS, grid
from longer.model_settings import ModelSettings

LOGS = ("journey", "generated", "movielens")
FULL = [arm for log in LOGS for arm in grid(log, quick=False, seeds=3)]
KINDS = {
    "longer": ("longer", {}),
    ITSELF: ("longer", {}),
    "none": ("none", {}),
    "sum_pooling": ("sum_pooling", {}),
    "din": ("din", {"recent_events": None}),
    "din_recent50": ("din", {"recent_events": 50}),
    "sim_hard": ("sim", {"search": "hard"}),
    "sim_soft": ("sim", {"search": "soft"}),
    "twin": ("twin", {}),
    "transformer": ("transformer", {}),
    "hstu": ("hstu", {}),
    "user_embedding": ("user_embedding", {}),
}


def settings_of(arm: Arm) -> ModelSettings:
    return model_settings(arm, BASES[arm.log])


def said(arm: Arm, pattern: str) -> str | None:
    """What the name says, as `D=(\\d+)` of "K=4 D=256"."""
    found = re.search(rf"(?<!\w){pattern}(?!\w)", arm.name)
    return found and found[1]


@pytest.mark.parametrize("arm", [arm for arm in FULL if arm.seed == 0], ids=lambda arm: f"{arm.log} {arm.name}")
def test_an_arm_is_what_its_name_says(arm: Arm) -> None:
    settings, base = settings_of(arm), BASES[arm.log]
    kind, about = KINDS[arm.encoder]
    assert settings.encoder.kind == kind
    assert about.items() <= settings.encoder.model_dump().items()
    assert kind == "longer" or arm.name.startswith(arm.encoder)
    assert settings.interactions == (FEATURES in arm.name)
    length = said(arm, r"trained at L=(\d+)") or said(arm, r"L=(\d+)") or base.length
    assert 0 <= settings.history_events - int(length) < max(16, int(length) // 8)
    assert arm.score_length == (int(tested) if (tested := said(arm, r"tested at (\d+)")) else None)
    narrow = said(arm, r"d=(\d+)")
    assert settings.width == int(narrow or said(arm, r"D=(\d+)") or base.width)
    assert (arm.seed, settings.encoding) == (0, "paper" if arm.name == "paper's encoding" else "appendable")
    assert settings.dropout == float(said(arm, r"dropout ([\d.]+)") or 0)
    assert arm.more_passes == int(said(arm, r"(\d) more") or 0)
    if rates := said(arm, r"(tables \S+ dense \S+)"):
        assert arm.trial == Trained(*map(float, rates.split()[1::2]), passes=3)
    else:
        assert arm.trial is None


@pytest.mark.parametrize(
    "arm",
    [arm for arm in FULL if arm.seed == 0 and arm.encoder in ("longer", ITSELF)],
    ids=lambda arm: f"{arm.log} {arm.name}",
)
def test_longer_is_merged_and_asked_as_its_name_says(arm: Arm) -> None:
    """The same events are queries whatever is merged, and a token is as wide."""
    settings, base = settings_of(arm), BASES[arm.log]
    merge = int(said(arm, r"K=(\d+)") or 4)
    groups = -(-(arm.length or base.length) // merge)
    wanted = int(said(arm, r"k=(\d+)") or 4 * base.num_queries // merge)
    assert settings.merge_size == merge
    assert settings.query_groups == min(wanted, groups)
    assert settings.inner_transformer == (merge > 1 and "no InnerTrans" not in arm.name)
    assert settings.queries == (said(arm, r"(\w+) queries") or "recent")
    assert settings.num_self_layers == int(said(arm, r"N=(\d)") or base.num_layers)
    assert settings.event_width == settings.width // merge


def test_tables_of_one_size_are_as_wide_as_longers_events() -> None:
    of_longer = settings_of(Arm("longer", "journey", "encoders", 0)).event_width
    arms = [arm for arm in FULL if arm.group == "tables"]
    assert {settings_of(arm).event_width for arm in arms} == {of_longer}
    assert {arm.encoder for arm in arms} == set(KINDS) - {"longer", ITSELF, "none", "din_recent50"}


def test_every_encoder_is_shown_with_and_without_the_features_and_headline_rows_have_three_seeds() -> None:
    seeds = defaultdict[tuple[str, str], set[int]](set)
    for arm in FULL:
        seeds[arm.log, arm.name].add(arm.seed)
    for log in LOGS:
        for name in GENERATED_ENCODERS if log == "generated" else KINDS:
            assert seeds[log, name] == {0, 1, 2}, (log, name)
            costly = log == "generated" and name not in ("longer", "none")
            assert seeds[log, name + FEATURES] == ({0} if costly else {0, 1, 2}), (log, name)
    assert all(found in ({0}, {0, 1, 2}) for found in seeds.values())


def test_longer_is_seen_on_as_much_history_as_each_encoder_of_its_cost() -> None:
    """Encoders that cost more are given less history, so that they cost what LONGER does, and once more than that."""
    costly = [arm for arm in FULL if arm.group == "flops" and arm.seed == 0]
    assert {arm.encoder for arm in costly} == {"din", "transformer", "hstu", "user_embedding"}
    assert all(arm.length and arm.length < BASES["journey"].length and not arm.features for arm in costly)
    assert [replace(arm, seed=1) for arm in costly] == [arm for arm in FULL if arm.group == "flops" and arm.seed == 1]
