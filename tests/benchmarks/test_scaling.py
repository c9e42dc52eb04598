"""A plan on paper that cannot drift: constants stand where it says, the document is what it prints, states have its size."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scaling
from benchmarks.capacity.measured import ROOT, measured, newest
from benchmarks.capacity.plan import MODEL, Plan, Workload, state_bytes, state_layout
from benchmarks.model_arms.sizes import SCHEMA, TASKS, model_settings
from longer.model.longer import Longer
from longer.model.state_layout import Precision
from longer.model.states import rows_for
from longer.serving.room import device_bytes_for
from longer.serving.store import StateStore

DOCUMENT = ROOT / "docs" / "scaling.md"
UPDATE = "python -m benchmarks.scaling --update docs/scaling.md"


def test_the_document_holds_what_the_module_prints() -> None:
    text = DOCUMENT.read_text()
    assert scaling.updated(text, scaling.parts(measured())) == text, f"run: {UPDATE}"


def test_every_constant_stands_in_the_file_that_it_names() -> None:
    for constant in measured().constants():
        found = re.search(rf"(?<![\d.,]){re.escape(constant.text)}(?!,?\d|\.\d)", (ROOT / constant.source).read_text())
        assert found, f"{constant.what}: {constant.text} is not in {constant.source}"
        if constant.source.endswith(".md"):
            assert float(constant.text.replace(",", "")) == constant.value


def test_a_new_page_changes_the_plan_and_a_page_without_a_figure_is_named(tmp_path: Path) -> None:
    for folder in ("benchmarks/results", "platform/longer/data", "platform/longer/serving"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    page = (tmp_path / newest(tmp_path, "sequences_cpu2")).read_text()
    rate = measured(tmp_path).build_events_per_s.text
    new = tmp_path / "benchmarks/results/sequences_cpu2_2999-01-01.md"
    new.write_text(page.replace(rate, "1,000,000"))
    slower = measured(tmp_path)
    assert slower.build_events_per_s.source.endswith("2999-01-01.md")
    assert Plan(Workload(), slower).build_core_hours() == pytest.approx(1e13 / 500_000 / 3600)
    new.write_text(page.replace("| longer |", "| shorter |"))
    with pytest.raises(ValueError, match=r"2999-01-01\.md has no 'events/s' of 'longer'"):
        measured(tmp_path)


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8", "fp8"])
def test_a_plan_counts_the_bytes_that_the_store_takes(monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
    """An estimate of a state's contents was 11% too low: a slot has room until the windows move, and sizes are few."""
    few_rows = {"item_rows": 2, "user_rows": 2, "categorical_rows": 2}
    model = Longer(MODEL.model_copy(update=few_rows), SCHEMA, TASKS)
    budget = 10 * state_bytes(10_000, precision)
    store = StateStore(model, budget, precision=precision)
    for num_events in (0, 1_000, 9_999, 10_000, 10_399, 123_456):
        slot = store.pool.slots.allocate(int(rows_for(store.layout, np.array([num_events]))[0]))
        assert slot is not None
        assert slot.size * store.layout.row_bytes == state_bytes(num_events, precision), num_events
    trash_bytes = store.layout.row_bytes
    assert store.reserved_bytes == (device_bytes_for(state_layout(precision), budget) + trash_bytes, 0)
    monkeypatch.setattr(StateStore, "__len__", lambda store: 1)
    assert store.index_bytes == Plan(Workload(), measured()).index_bytes()


def test_the_plan_s_model_is_the_one_that_was_measured() -> None:
    assert model_settings(32, 10_000) == MODEL


def test_a_share_that_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["scaling", "--hit_shares", "1.0"])
    with pytest.raises(SystemExit) as ended:
        scaling.main()
    assert ended.value.code == 2
    assert "argument --hit_shares: Input should be less than 1" in capsys.readouterr().err
