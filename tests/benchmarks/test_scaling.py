"""A plan on paper that cannot drift: constants stand where it says, the document is what it prints, states have its size."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from benchmarks.capacity.measured import ROOT, measured, newest
from benchmarks.capacity.plan import MODEL, Plan, Workload, state_bytes
from benchmarks.model_arms.sizes import model_settings
from longer.model.state_layout import Precision, StateLayout
from tests.model.generate import small_model

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
    for folder in ("benchmarks/results", "platform/longer/data"):
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


@pytest.mark.parametrize(("precision", "element_bytes"), [("float32", 4), ("bf16", 2)])
def test_state_bytes_are_those_of_real_states(precision: Precision, element_bytes: int) -> None:
    """A full window's slot, within a tenth: a slot has room for a whole stride more, the plan for Python's objects."""
    model = small_model(dtype=torch.float32)
    layout = replace(
        StateLayout.of(model, precision),
        windows=MODEL.windows,
        num_heads=MODEL.num_heads,
        head_width=MODEL.width // MODEL.num_heads,
        num_layers=MODEL.num_self_layers + 1,
    )
    planned = state_bytes(MODEL, MODEL.history_events + MODEL.windows.stride_events - MODEL.merge_size, element_bytes)
    assert layout.largest_rows * layout.row_bytes == pytest.approx(planned, rel=0.1)


def test_the_plan_s_model_is_the_one_that_was_measured() -> None:
    assert model_settings(32, 10_000) == MODEL


def test_a_share_that_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["scaling", "--hit_shares", "1.0"])
    with pytest.raises(SystemExit) as ended:
        scaling.main()
    assert ended.value.code == 2
    assert "argument --hit_shares: Input should be less than 1" in capsys.readouterr().err
