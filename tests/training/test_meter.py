"""Where time goes and what is shown of it: phases add up, waiting is told from work, TensorBoard gets every number."""

import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from longer.files import file_sizes, read_bytes
from longer.training.meter import Meter, Scalars
from longer.training.timing import PhaseTimer

CPU = torch.device("cpu")


def test_phases_add_up_until_they_are_taken() -> None:
    timer = PhaseTimer(CPU)
    for _ in range(2):
        with timer.phase("forward"):
            time.sleep(0.01)
    with timer.host_phase("optimizer"):
        pass
    seconds = timer.take()
    assert 0.02 <= seconds["forward"] < 1
    assert set(seconds) == {"forward", "optimizer"}
    assert timer.take() == {}


def test_waiting_for_items_is_timed_and_what_is_done_with_them_is_not() -> None:
    def slow() -> Iterator[int]:
        for number in range(2):
            time.sleep(0.02)
            yield number

    timer, received = PhaseTimer(CPU), []
    for item in timer.waits(slow(), "data_wait"):
        received.append(item)
        time.sleep(0.5)
    assert received == [0, 1]
    assert 0.04 <= timer.take()["data_wait"] < 0.5


def test_shares_are_of_the_time_without_pauses_and_a_note_tells_the_wait() -> None:
    meter = Meter(num_steps=4, num_pauses=1, device=CPU)
    with meter.paused():
        time.sleep(0.2)
    meter.add(num_requests=10, num_candidates=50)
    time.sleep(0.1)
    meter.add_phases({"data_wait": 0.05})
    meter.add_phases({"data_wait": 0.05})
    assert 0.5 < meter.rates()["data_wait_share"] <= 1
    assert meter.rates()["impressions_per_s"] > 50 / 0.29
    assert "waiting for data" in meter.note(1)


def test_the_time_left_has_the_pauses_to_come_and_not_those_that_are_over() -> None:
    meter = Meter(num_steps=3, num_pauses=3, device=CPU)
    with meter.paused():  # as a day is tested before its first step: no reason to expect it of every step
        time.sleep(0.2)
    meter.add(num_requests=10, num_candidates=50)
    assert 2 * 0.2 <= meter.left_s(done=1) < 3 * 0.2
    for _ in range(2):
        with meter.paused():
            time.sleep(0.2)
    assert meter.left_s(done=1) < 0.2
    assert meter.rates()["paused_share"] > 0.9


def test_a_share_told_between_two_records_is_that_of_the_last_one_and_does_not_fade() -> None:
    meter = Meter(num_steps=4, num_pauses=1, device=CPU)
    meter.add(num_requests=10, num_candidates=50)
    time.sleep(0.05)
    meter.add_phases({"data_wait": 0.05})
    at_the_record = meter.rates()["data_wait_share"]
    time.sleep(0.2)
    assert meter.rates()["data_wait_share"] == at_the_record
    assert meter.rates()["impressions_per_s"] < 50 / 0.25


def scalars_in(folder: str) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would read: each file is records of length, checksum, event, checksum."""
    found: dict[str, list[tuple[int, float]]] = {}
    for name in sorted(file_sizes(folder)):
        data = read_bytes(f"{folder}/{name}")
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@pytest.mark.parametrize("on_s3", [False, True])
def test_tensorboard_has_every_number_of_the_history_once(
    on_s3: bool, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = f"{request.getfixturevalue('s3')}/tensorboard" if on_s3 else str(tmp_path / "tensorboard")
    first = {"step": 3, "loss": 0.5, "day": "2026-01-01", "validation": {"label": {"auc": 0.75}}}
    killed = Scalars(folder, [first])
    killed.add({"step": 4, "loss": 9.0})
    killed.save()
    resumed = Scalars(folder, [first])
    resumed.add({"step": 4, "loss": 0.25})
    resumed.close()
    assert scalars_in(folder) == {"loss": [(3, 0.5), (4, 0.25)], "validation/label/auc": [(3, 0.75)]}
    assert len(list(tmp_path.glob("tensorboard-*"))) == on_s3, "what the killed one left"
