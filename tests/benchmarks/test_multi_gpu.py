"""What `benchmarks.multi_gpu` derives from its measurements, and the divisions of work that it compares."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.model_arms.sizes import zipf_lengths
from benchmarks.multi_gpu import reports
from benchmarks.multi_gpu_arms.runs import parts
from benchmarks.multi_gpu_arms.steps import (
    BALANCED,
    BY_COUNT,
    FIXED_USERS,
    NO_EXCHANGE,
    NUM_BATCHES,
    ROWS,
    Row,
    divided,
    imbalance,
    summary,
)
from longer.storage import Version

USERS, DEVICES = 64, 4
LENGTHS = zipf_lengths(np.random.default_rng(0), USERS * NUM_BATCHES, 2_000)


@pytest.mark.parametrize("arm", [BALANCED, BY_COUNT, FIXED_USERS])
def test_each_division_takes_every_user_once(arm: str) -> None:
    steps = divided(LENGTHS, DEVICES, arm)
    assert [len(parts) for parts in steps] == [DEVICES] * NUM_BATCHES
    taken = np.concatenate([part for parts in steps for part in parts])
    assert sorted(taken) == sorted(np.tile(LENGTHS, DEVICES))


def test_the_division_by_number_is_of_the_same_steps() -> None:
    both = divided(LENGTHS, DEVICES, BALANCED), divided(LENGTHS, DEVICES, BY_COUNT)
    for one, other in zip(*both, strict=True):
        assert sorted(np.concatenate(one)) == sorted(np.concatenate(other))


def test_the_division_by_number_is_even_in_users_and_the_other_in_tokens() -> None:
    by_count, by_tokens = divided(LENGTHS, DEVICES, BY_COUNT), divided(LENGTHS, DEVICES, BALANCED)
    for parts_N in by_count:
        sizes = [len(part) for part in parts_N]
        assert max(sizes) - min(sizes) <= 1
    assert imbalance(by_tokens) < 1.02 < 1.1 < imbalance(by_count)


def test_steps_of_fixed_users_are_even_in_users_and_uneven_in_tokens() -> None:
    steps = divided(LENGTHS, DEVICES, FIXED_USERS)
    assert {len(part) for parts_N in steps for part in parts_N} == {USERS}
    assert imbalance(steps) > 1.1


def test_one_device_has_as_many_tokens_as_each_of_several() -> None:
    """Else weak scaling would compare unequal work."""
    steps = [divided(LENGTHS, num, BALANCED) for num in (1, DEVICES)]
    one, several = (sum(part.sum() for parts in of_num for part in parts) for of_num in steps)
    assert several == DEVICES * one


def row(num_devices: int, arm: str, step_ms: float, impressions: int) -> Row:
    return Row("L2000_64", num_devices, arm, step_ms, impressions / step_ms * 1000, 1.0, 0.0, [])


def test_efficiency_gain_and_share_are_ratios_of_what_was_measured() -> None:
    rows = [
        row(1, BALANCED, 10.0, 100),
        row(4, BALANCED, 12.5, 400),
        row(4, NO_EXCHANGE, 10.0, 400),
        row(4, BY_COUNT, 15.0, 400),
        row(4, FIXED_USERS, 20.0, 400),
        row(4, ROWS, 10.0, 400),
    ]
    found = {key: value["L2000_64"] for key, value in summary(rows).items()}
    assert found == {
        "weak_scaling_efficiency": {"4": 0.8},
        "by_count_efficiency": {"4": 0.6667},
        "balancing_gain": {"4": 1.2},
        "balancing_gain_over_fixed_users": {"4": 1.6},
        "all_reduce_share": {"4": 0.2},
        "sharded_vs_replicated": {"4": 1.25},
    }


def test_a_resumed_run_is_taken_apart_where_it_was_resumed_even_if_the_clock_shows_more() -> None:
    def record(step: int, elapsed_s: float, impressions: float) -> dict[str, float]:
        return {"step": step, "elapsed_s": elapsed_s, "impressions_per_s": impressions / elapsed_s}

    history = [
        record(1, 1, 10),
        record(20, 2, 200),
        {"step": 20, "validation": 0.5},
        record(21, 9, 10),
        record(40, 20, 200),
    ]
    first, second = parts(Version("id", "path", {"history": history}))
    assert [r["step"] for r in first] == [1, 20]
    assert [r["step"] for r in second] == [21, 40]


_TELLS_TWICE = """
import time
print("one row\\n{\\"rows\\": 1}", flush=True)
print("two rows\\n{\\"rows\\": 2}\\nhalf a page", flush=True)
"""


@pytest.mark.parametrize(
    ("ends", "says"),
    [("time.sleep(60)", "serving: cut off after 1 s."), ("exit(3)", "serving: failed with exit code 3")],
)
def test_a_part_that_does_not_end_well_gives_what_it_has_told(ends: str, says: str) -> None:
    *told, (page, found) = reports("serving", [sys.executable, "-c", _TELLS_TWICE + ends], most_s=1.0)
    assert told == [("one row\n", {"rows": 1}), ("two rows\n", {"rows": 2})]
    assert found == {"rows": 2}
    assert page.startswith("two rows\n")
    assert says in page


_LEAVES_A_PROCESS = """
import subprocess, sys, time
subprocess.Popen(["flock", sys.argv[1], "sh", "-c", "echo > $0.held; sleep 60", sys.argv[1]], stdout=subprocess.DEVNULL)
while not Path(sys.argv[1] + ".held").exists():
    time.sleep(0.01)
print("{}", flush=True)
"""


@pytest.mark.parametrize("ends", ["", "time.sleep(60)"])
def test_what_a_part_has_started_ends_with_it(ends: str, tmp_path: Path) -> None:
    """Ended or cut off: what stays would hold devices, and whoever waits for the output."""
    lock = str(tmp_path / "lock")
    code = f"from pathlib import Path\n{_LEAVES_A_PROCESS}{ends}"
    *_, (_, found) = reports("resume", [sys.executable, "-c", code, lock], most_s=1.0)
    assert found == {}
    assert subprocess.run(["flock", "--timeout", "5", lock, "true"], check=False).returncode == 0
