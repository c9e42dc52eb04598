"""What a stage tells of itself is about its work."""

import io

import pytest

from longer import progress
from longer.progress import Bar, say, track


def test_a_rate_counts_from_when_the_work_began_not_from_when_workers_were_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(track(iter(range(4)), 4, "scoring", "buckets", seconds=lambda: 2.0)) == [0, 1, 2, 3]
    assert "scoring: 4/4 buckets, 2.0 buckets/s" in capsys.readouterr().err


def test_no_end_is_told_from_the_first_few_which_are_the_largest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    for _ in track(iter(range(8)), 8, "scoring", "buckets"):
        pass
    told = capsys.readouterr().err.splitlines()
    assert ["left" in line for line in told] == [False] + 6 * [True] + [False]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_work_elsewhere_is_one_line_on_a_terminal_that_others_do_not_tear(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    bar = Bar("step")
    bar.show("train", 1, 4, "9 requests/s")
    say("train", "step 2: validation")
    bar.show("train", 4, 4, "8 requests/s")
    bar.close()
    told = terminal.getvalue()
    assert "\rtrain: step 2: validation\n" in told
    assert "100%" in told
    assert "step 4/4, 8 requests/s" in told
    assert told.count("\n") == 2


def test_work_elsewhere_tells_its_end_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("step")
    for done in range(1, 5):
        bar.show("train", done, 4, "9 requests/s")
    bar.close()
    assert capsys.readouterr().err.splitlines() == ["train: step 1/4, 9 requests/s", "train: step 4/4, 9 requests/s"]


def test_an_end_is_told_by_the_size_of_what_is_done_where_items_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    sizes = [60, 20, 10, 6, 4]
    done: list[int] = []
    items = (done.append(size) or size for size in sizes)
    for _ in track(items, 5, "scoring", "buckets", seconds=lambda: sum(done) / 10, part_done=lambda: sum(done) / 100):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("about ")[2] for line in lines[:4]] == [f"{left} s left" for left in (4, 2, 1, 0)]
    assert "left" not in lines[4]
