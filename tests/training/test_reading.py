"""What a run reads is the same, to an element, however many tasks read it."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longer.config import Settings
from longer.errors import UserError
from longer.storage import Table
from longer.training import reading
from longer.training.content import Content, Job, Tables
from longer.training.loader import Part
from longer.training.mapped import Mapped, ReadParts, num_bytes, write_parts
from longer.training.reading import in_groups, request_files
from tests.serving.tables import NUM_BUCKETS, build_world, publish_requests


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    world = build_world(tmp_path_factory.mktemp("reading"))
    sequences = Table(world.path("tables", "sequences")).require("")
    requests = publish_requests(world, sequences)
    return Job(with_few_requests(world), {"sequences": sequences.id, "requests": requests.id})


def with_few_requests(world: Settings) -> Settings:
    """So that a part's choice of them must not be the whole's."""
    few = {"max_requests": 50, "max_validation_requests": 20}
    return world.model_copy(update={"train": world.train.model_copy(update=few)})


def laid_out(parts: list[Part], folder: Path) -> Part:
    """The parts in a file, mapped."""
    sizes = [num_bytes(part) for part in parts]
    room = {name: sum(size[name] for size in sizes) for name in sizes[0]}
    read = ReadParts([], parts[0].none(), room, str(folder))
    with read.file() as file:
        return Mapped(
            f"/proc/self/fd/{file.fileno()}", read.none, write_parts(file, read.none, read.room, parts)
        ).open()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, pa.Array):
        return one.equals(other)
    if isinstance(one, dict):
        return [*one] == [*other] and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return one == other


@pytest.mark.parametrize("since_ms", [None, 0])
@pytest.mark.parametrize("cuts", [[[0], [*range(1, NUM_BUCKETS)]], [[bucket] for bucket in range(NUM_BUCKETS)]])
def test_the_order_of_training_does_not_depend_on_how_many_tasks_read(
    job: Job, cuts: list[list[int]], since_ms: int | None, tmp_path: Path
) -> None:
    job = Job(job.settings, job.versions, since_ms=since_ms)
    tables = Tables.of(job)
    whole, in_parts = tables.read(range(NUM_BUCKETS)), laid_out([tables.read(buckets) for buckets in cuts], tmp_path)
    assert len(whole.requests[0]) > 40
    assert same(whole, in_parts)
    of_whole, of_parts = Content(job, whole), Content(job, in_parts)
    assert same(of_whole.packs, of_parts.packs)
    assert of_whole.expected == of_parts.expected
    assert same(of_whole.valid, of_parts.valid)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 60))
def test_no_task_reads_more_than_it_may_but_of_one_bucket(num_bytes: list[int], most: int) -> None:
    groups = in_groups(np.array(num_bytes), most)
    assert [bucket for group in groups for bucket in group] == [*range(len(num_bytes))]
    assert all(sum(num_bytes[bucket] for bucket in group[:-1]) <= most for group in groups)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_table_is_read_by_many_tasks_and_not_by_one_node_s_single_core(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reading, "_PART_BYTES", 1)
    read_by = reading._read_part

    def read(tables: Tables, buckets: list[int]) -> Any:
        (tmp_path / f"{buckets}").touch()
        return read_by(tables, buckets)

    monkeypatch.setattr(reading, "_read_part", read)
    with request_files(job) as files:
        found = files.open()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"[{bucket}]" for bucket in range(NUM_BUCKETS))
    monkeypatch.undo()
    assert same(Tables.of(job).read(range(NUM_BUCKETS)), found), "what is mapped stays until it is not used any more"


@pytest.mark.parametrize("split", [0, 1])
def test_seconds_are_no_labels_of_a_task_that_is_binary(job: Job, split: int) -> None:
    """Cross-entropy of a label of 7 has no bottom: the loss falls for ever and scores are 1."""
    tables = Tables.of(job)
    part = tables.read(range(NUM_BUCKETS))
    requests = [*part.requests]  # those of training, then those of validation
    requests[split] = replace(requests[split], labels={"label": 7 * requests[split].labels["label"]})
    with pytest.raises(
        UserError, match="labels of label are 0 to 7, a binary task's are 0 to 1: make it kind: regression"
    ):
        tables.check([tables.look(Part(part.histories, requests, part.rows))])


@pytest.mark.parametrize("label", [np.inf, -np.finfo(np.float32).max])
def test_a_label_of_which_the_loss_is_infinite_is_refused_before_a_step_is_lost_to_it(job: Job, label: float) -> None:
    tables = Tables.of(job)
    part = tables.read(range(NUM_BUCKETS))
    given = part.requests[0].labels["label"].astype(np.float32)
    given[[0, 1]] = np.nan, label  # a missing one hides no other
    requests = [replace(part.requests[0], labels={"label": given}), *part.requests[1:]]
    with pytest.raises(UserError, match=r"labels of label .* of which a loss is infinite"):
        tables.check([tables.look(part), tables.look(Part(part.histories, requests, part.rows))])
