"""The arithmetic that makes states appendable."""

from hypothesis import given
from hypothesis import strategies as st

from longer.windows import WindowRule


@st.composite
def rules(draw: st.DrawFn) -> WindowRule:
    stride = draw(st.integers(1, 6))
    query = stride * draw(st.integers(1, 4))
    return WindowRule(draw(st.integers(1, 5)), query + stride * draw(st.integers(0, 4)), query, stride)


@given(rules(), st.integers(0, 2000))
def test_windows_move_only_together_and_by_whole_strides(rule: WindowRule, num_events: int) -> None:
    moves = [start(num_events + 1) - start(num_events) for start in (rule.history_start, rule.query_start)]
    assert all(move in (0, rule.stride_groups) for move in moves)
    if rule.history_start(num_events) > 0:
        assert moves[0] == moves[1]


@given(rules(), st.integers(0, 2000))
def test_a_full_window_holds_w_to_w_plus_stride_less_one_groups(rule: WindowRule, num_events: int) -> None:
    for start, window in ((rule.history_start, rule.history_groups), (rule.query_start, rule.query_groups)):
        held = rule.num_groups(num_events) - start(num_events)
        assert held <= window + rule.stride_groups - 1
        assert held >= min(window, rule.num_groups(num_events))
    assert num_events - rule.history_start(num_events) * rule.merge_size <= rule.max_history_events
