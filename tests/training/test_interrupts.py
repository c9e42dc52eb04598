"""How training ends when its process is told to end."""

import signal
import sys

import pytest

from longer.training.run import interrupts_as_before


def test_a_job_that_is_terminated_does_not_say_that_ctrl_c_was_pressed() -> None:
    """Ray exits with the signal's number; Ray Train's handler of Ctrl-C with 0, or with 1 out of a wait of Ray's."""
    with pytest.raises(SystemExit) as ended, interrupts_as_before():
        sys.exit(signal.SIGTERM)
    assert ended.value.code == signal.SIGTERM
    for code in (0, 1):
        with pytest.raises(KeyboardInterrupt), interrupts_as_before():
            sys.exit(code)
