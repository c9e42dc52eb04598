"""A serving benchmark that is cut off keeps the page of what it measured."""

import json
from pathlib import Path

from benchmarks.serving import Kept, options
from benchmarks.serving_arms.arms import Arm
from benchmarks.serving_arms.load import Sample
from benchmarks.serving_arms.page import Measured


def arm(name: str, rps: int, at_load: Sample | None = None) -> Arm:
    sample = Sample([10.0] * rps, body_ms=[1.0] * rps, seconds=1)
    return Arm(name, [{1: sample, 8: sample}], at_load)


def test_the_file_has_a_page_after_each_step_and_null_for_what_is_not_there_yet(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    kept = Kept(str(file), Measured(options(["--quick"])))
    with kept.timed("tables"):
        pass
    assert "tables 0; 0 in all" in file.read_text()
    assert set(json.loads(file.read_text().splitlines()[-1]).values()) == {None}
    compared = {"floor": arm("the floor", 200), "without": arm("without", 125), "plain": arm("plain", 50)}
    kept.note(hit=arm("all hits", 100), **compared)
    *lines, last = file.read_text().splitlines()
    figures = json.loads(last)
    assert any("| all hits |" in line for line in lines)
    assert (figures["vs_floor_rps"], figures["vs_plain_server_rps"], figures["p50_ms"]) == (0.5, 2.0, 10.0)
    assert figures["p99_ms"] is None, "there was no constant arrival yet"
    kept.note(hit=arm("all hits", 100, Sample([30.0] * 9, seconds=1)))
    assert json.loads(file.read_text().splitlines()[-1])["p99_ms"] == 30.0
