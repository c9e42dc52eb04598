"""What a checkpoint comes from: no day is skipped or trained twice for it, no leak goes untold, no descendant is rolled back."""

from pathlib import Path
from typing import Any

import pytest

from longer.errors import UserError
from longer.model_settings import ModelSettings
from longer.schema import EventSchema
from longer.storage import Table, Version
from longer.training.checkpoints import CheckpointInfo
from longer.training.evaluate import _check_held_out
from longer.training.lineage import finished, past_of, trained_of_log, unknown_bases

MARCH, APRIL, JUNE = (f"2026-0{month}-01T00:00:00.000+00:00" for month in (3, 4, 6))


def published(table: Table, version_id: str, **manifest: Any) -> Version:
    table.begin(version_id)
    return table.publish(version_id, manifest)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Table:
    return Table(str(tmp_path / "checkpoints"))


@pytest.fixture
def requests(tmp_path: Path) -> Version:
    """The served requests, after an earlier version of them."""
    table = Table(str(tmp_path / "requests"))
    published(table, "own_before")
    return published(table, "own")


def test_days_that_a_base_has_seen_of_another_log_only_are_not_skipped(checkpoints: Table, requests: Version) -> None:
    trained = [{"requests": "another", "until": JUNE}, {"requests": "own", "until": MARCH}]
    tuned = published(checkpoints, "tuned", trained=trained, trained_until=JUNE)
    assert trained_of_log(tuned, requests) == MARCH


def test_days_of_this_log_that_a_base_has_trained_are_not_trained_again(checkpoints: Table, requests: Version) -> None:
    trained = [
        {"requests": "another", "until": JUNE},
        {"requests": "own_before", "until": APRIL},
        {"requests": "own", "until": MARCH},
    ]
    assert trained_of_log(published(checkpoints, "tuned", trained=trained), requests) == APRIL


def test_an_old_version_of_the_requests_may_be_gone_when_its_run_is_continued(
    checkpoints: Table, requests: Version
) -> None:
    base = published(checkpoints, "base", trained=[{"requests": "removed", "until": MARCH}])
    assert trained_of_log(base, requests) == MARCH


@pytest.mark.parametrize("manifest", [{"trained_until": JUNE, "trained": []}, {}])
def test_a_validation_that_a_base_may_have_trained_on_does_not_pass_for_held_out(
    manifest: dict[str, Any], checkpoints: Table, capsys: pytest.CaptureFixture
) -> None:
    past = past_of(published(checkpoints, "base", **manifest).path, None, MARCH)
    assert past.is_leaking
    assert "may be of requests that it has seen" in capsys.readouterr().err


def test_a_test_split_that_a_base_without_a_manifest_may_have_trained_on_is_told_at_any_remove(
    tmp_path: Path, checkpoints: Table, requests: Version
) -> None:
    """A checkpoint in the folder of a run of --continue has trained the test split, and cannot say so."""
    past = past_of(str(tmp_path / "training" / "continued" / "step_0000008"), None, MARCH)
    own = {"requests": "own", "until": MARCH}
    tuned = published(checkpoints, "tuned", trained=[*past.trained, own], trained_until=MARCH)
    assert unknown_bases(tuned.manifest) == [str(tmp_path / "training" / "continued" / "step_0000008")]
    assert trained_of_log(tuned, requests) == MARCH
    again = published(
        checkpoints, "again", trained=[*past_of(tuned.path, None, MARCH).trained, own], trained_until=MARCH
    )
    assert unknown_bases(again.manifest) == unknown_bases(tuned.manifest)
    assert not unknown_bases({"trained": [own]})


def tower_at(path: str) -> CheckpointInfo:
    return CheckpointInfo(path, "5f3c", ModelSettings(), EventSchema(), ())


def test_what_a_frozen_user_tower_has_seen_is_told_but_is_no_day_that_the_model_has_trained(
    checkpoints: Table, requests: Version, capsys: pytest.CaptureFixture
) -> None:
    tower = published(checkpoints, "tower", trained=[{"requests": "own", "until": JUNE}], trained_until=JUNE)
    past = past_of(None, tower_at(tower.path), MARCH)
    assert past.is_leaking
    assert f"{tower.path} has trained requests until {JUNE}, validation starts at {MARCH}" in capsys.readouterr().err
    own = {"requests": "own", "until": MARCH}
    model = published(checkpoints, "m", trained=[*past.trained, own], trained_until=MARCH, upstream=past.upstream)
    assert trained_of_log(model, requests) == MARCH, "--continue trains them"
    tuned = past_of(model.path, None, APRIL)
    assert tuned.is_leaking
    assert f"{tower.path}, the user tower of {model.path}, has trained requests until" in capsys.readouterr().err
    assert tuned.upstream == past.upstream
    assert not past_of(model.path, None, JUNE).is_leaking


def test_a_test_split_that_a_user_tower_has_seen_is_not_evaluated_and_one_that_it_may_have_seen_is_told(
    tmp_path: Path, checkpoints: Table, capsys: pytest.CaptureFixture
) -> None:
    requests = published(Table(str(tmp_path / "split")), "split", test_from=APRIL)
    seen = published(checkpoints, "tower", trained=[], trained_until=JUNE).path
    of_a_run = str(tmp_path / "training" / "run" / "step_0000008")

    def model_with(tower: str) -> Version:
        about = {"trained": [], "trained_until": MARCH, "upstream": past_of(None, tower_at(tower), MARCH).upstream}
        return published(checkpoints, f"model_{len(tower)}", **about)

    with pytest.raises(UserError, match=f"{seen}, the user tower of .* has trained requests until 2026-06-01"):
        _check_held_out(model_with(seen), requests)
    capsys.readouterr()
    assert _check_held_out(model_with(of_a_run), requests)
    assert f"comes from {of_a_run}, which does not say what it was trained on" in capsys.readouterr().err


def test_a_base_that_ended_where_validation_starts_raises_no_alarm(
    checkpoints: Table, capsys: pytest.CaptureFixture
) -> None:
    past = past_of(published(checkpoints, "base", trained_until=MARCH, trained=[]).path, None, MARCH)
    assert not past.is_leaking
    assert not capsys.readouterr().err


@pytest.mark.parametrize("link", ["base", "continues"])
def test_a_first_runs_command_does_not_roll_back_what_came_from_it(
    link: str, checkpoints: Table, capsys: pytest.CaptureFixture
) -> None:
    first = published(checkpoints, "first")
    published(checkpoints, "tuned", **{link: first.id})
    last = published(checkpoints, "continued", continues="tuned")
    found, served = finished(checkpoints, first.id), checkpoints.current()
    assert found == first
    assert served == last
    assert f"nothing changed; {last.id}, which comes from it, is served" in capsys.readouterr().err


def test_a_command_of_other_settings_serves_their_model_again_and_says_so(
    checkpoints: Table, capsys: pytest.CaptureFixture
) -> None:
    first, other = published(checkpoints, "first"), published(checkpoints, "other", base="of_another_table")
    assert finished(checkpoints, first.id) == first
    assert checkpoints.current() == first
    assert f"is served in place of {other.id}" in capsys.readouterr().err
