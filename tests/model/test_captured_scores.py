"""Which graph scores a batch: nobody waits for one to be captured where a larger one is there, nor pays for that for ever."""

import pytest

from longer.model.captured_scores import OFTEN, Size, SizeChoice


@pytest.mark.parametrize(
    ("size", "captured", "chosen"),
    [
        ((2, 512), [], (2, 512)),
        ((2, 512), [(2, 512), (2, 640)], (2, 512)),
        (
            (2, 512),
            [(2, 1024), (3, 640), (2, 768)],
            (3, 640),
        ),  # the fewest candidates: users who are not there cost little
        ((2, 64), [(2, 1024)], (2, 1024)),
        ((2, 64), [(2, 1280)], (2, 64)),
        ((2, 1024), [(2, 2048)], (2, 2048)),
        ((2, 1024), [(2, 2560)], (2, 1024)),
        ((2, 512), [(5, 640)], (2, 512)),
        ((3, 512), [(5, 640)], (5, 640)),
        ((5, 512), [(3, 640), (5, 448)], (5, 512)),  # too small
    ],
)
def test_a_batch_of_a_new_size_is_scored_by_the_least_graph_that_has_room_unless_that_is_much_larger(
    size: Size, captured: list[Size], chosen: Size
) -> None:
    assert SizeChoice().of(size, captured) == chosen


def test_a_size_that_comes_often_gets_a_graph_of_its_own_and_again_when_that_has_gone() -> None:
    choice, size, larger = SizeChoice(), (2, 512), (2, 640)
    for _ in range(2):
        assert [choice.of(size, [larger]) for _ in range(OFTEN)] == [larger] * OFTEN
        assert choice.of((2, 576), [larger]) == larger  # another size, counted apart
        assert choice.of(size, [larger]) == size
        assert choice.of(size, [larger, size]) == size
