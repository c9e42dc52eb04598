"""Checkpoints: what is saved comes back; what does not fit is refused in one line; nothing that is loaded can run code."""

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from longer.config import Settings
from longer.errors import UserError
from longer.files import read_bytes, write_bytes
from longer.model.longer import Longer
from longer.schema import EventSchema
from longer.section import same_for_workers
from longer.training.checkpoints import check_start, load_model, save_weights, weights_of
from longer.training.cursor import Position
from longer.training.metrics import defined
from longer.training.run import start_of
from longer.training.steps import selection_score
from longer.training.trainer_state import (
    TrainerState,
    best_of_epochs,
    load_own_weights,
    load_trainer,
    moments_of,
    read_trainer_state,
    save_trainer,
)
from longer.training_settings import TrainSettings
from tests.model.generate import SCHEMA, TASKS, small_model


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, Longer]:
    model = small_model(dtype=torch.float32)
    directory = str(tmp_path / "checkpoint")
    save_weights(directory, weights_of(model), model.settings, SCHEMA, TASKS)
    return directory, model


def test_a_model_comes_back_with_its_weights_settings_and_version(saved: tuple[str, Longer]) -> None:
    directory, model = saved
    loaded, info = load_model(directory, expected_schema=SCHEMA)
    assert info.model == model.settings
    assert info.schema == SCHEMA
    assert info.tasks == TASKS
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert save_weights(directory, weights_of(loaded), info.model, info.schema, info.tasks) == info.model_version


def test_loading_leaves_the_random_stream_as_it_was(saved: tuple[str, Longer]) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_model(saved[0])
    assert torch.equal(torch.rand(3), expected)


def test_version_changes_with_any_weight(saved: tuple[str, Longer], tmp_path: Path) -> None:
    directory, model = saved
    before = load_model(directory)[1].model_version
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert save_weights(str(tmp_path / "other"), weights_of(model), model.settings, SCHEMA, TASKS) != before


def test_a_model_on_s3_loads_like_a_local_one(saved: tuple[str, Longer], s3: str) -> None:
    directory, _ = saved
    for file in ("model.json", "model.safetensors"):
        write_bytes(f"{s3}/checkpoint/{file}", read_bytes(f"{directory}/{file}"))
    assert load_model(f"{s3}/checkpoint")[1].model_version == load_model(directory)[1].model_version


def edit_json(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        about = json.loads((directory / "model.json").read_text())
        change(about)
        (directory / "model.json").write_text(json.dumps(about))

    return edit


def edit_tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = safetensors.torch.load((directory / "model.safetensors").read_bytes())
        change(tensors)
        (directory / "model.safetensors").write_bytes(safetensors.torch.save(tensors))

    return edit


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "model.json").unlink(), "model.json: no such file"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: no such file"),
        (lambda d: (d / "model.json").write_text("{"), "model.json: not valid JSON"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x00" * 64), "model.safetensors: not a safetensors file"),
        (lambda d: (d / "model.safetensors").write_bytes(pickle.dumps({"w": 1})), "not a safetensors file"),
        (edit_json(lambda about: about.update(format_version=99)), "format version 99"),
        (edit_json(lambda about: about.pop("tasks")), "no field 'tasks'"),
        (edit_json(lambda about: about["model"].update(depth=3)), "not a model's description"),
        (edit_json(lambda about: about["model"].update(item_rows=77)), "tensor embedding.item"),
        (edit_json(lambda about: about["model"].update(count_events=[3, 5])), "content is not that of"),
        (edit_tensors(lambda tensors: tensors.pop(sorted(tensors)[0])), "is absent"),
        (edit_tensors(lambda tensors: tensors.update(extra=torch.zeros(2))), "tensor extra"),
        (edit_tensors(lambda tensors: tensors[sorted(tensors)[0]].add_(1)), "content is not that of"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    saved: tuple[str, Longer], damage: Callable[[Path], None], says: str
) -> None:
    damage(Path(saved[0]))
    with pytest.raises(UserError, match=says) as refused:
        load_model(saved[0])
    assert saved[0] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_of_another_schema_is_refused(saved: tuple[str, Longer]) -> None:
    with pytest.raises(UserError, match="is not the settings' event_schema"):
        load_model(saved[0], expected_schema=EventSchema())


def test_training_goes_on_from_saved_state_as_if_never_interrupted(saved: tuple[str, Longer]) -> None:
    directory, model = saved
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(of_model: Longer, of_optimizer: torch.optim.Optimizer) -> None:
        of_optimizer.zero_grad()
        sum((p**2).sum() for p in of_model.parameters()).backward()  # type: ignore[union-attr]
        of_optimizer.step()

    step(model, optimizer)
    epochs = [{"num_requests": 9, "id_sum": "00000000000000ff"}]
    state = TrainerState(Position(1, 7), [{"step": 3, "loss": 0.5}], epochs, [{"step": 2, "score": 0.75}])
    save_weights(directory, weights_of(model), model.settings, SCHEMA, TASKS)
    save_trainer(directory, moments_of(model, optimizer), state)
    step(model, optimizer)

    resumed, _ = load_model(directory)
    fresh = torch.optim.AdamW(resumed.parameters(), lr=0.1)
    assert load_trainer(directory, resumed, fresh) == state
    step(resumed, fresh)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def settings_like(model: Longer, **changed: Any) -> Settings:
    """Settings that fit `model`, but for the changed ones of its own."""
    return Settings(
        event_schema=SCHEMA,
        model={**model.settings.model_dump(), **changed},
        train={"tasks": [task.model_dump() for task in TASKS]},
    )


def test_training_may_start_from_a_checkpoint_that_fits(saved: tuple[str, Longer]) -> None:
    directory, model = saved
    assert check_start(directory, settings_like(model, dropout=0.5)).model_version
    other = small_model(seed=5, dtype=torch.float32)
    load_own_weights(directory, other)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_worker_may_start_from_a_checkpoint_on_s3_as_from_a_local_one(saved: tuple[str, Longer], s3: str) -> None:
    directory, model = saved
    for file in ("model.json", "model.safetensors"):
        write_bytes(f"{s3}/checkpoint/{file}", read_bytes(f"{directory}/{file}"))
    for path in (directory, f"{s3}/checkpoint"):
        start = pickle.loads(pickle.dumps(start_of(path)))  # workers get it so
        other = small_model(seed=5, dtype=torch.float32)
        with start.as_directory() as here:
            load_own_weights(here, other)
        assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="no such file on the node of this worker: start from s3://"):
        load_own_weights(f"{directory}/elsewhere", other)


def test_a_checkpoint_on_s3_is_found_though_its_path_ends_with_a_slash(saved: tuple[str, Longer], s3: str) -> None:
    """As consoles and listings show it: S3 would look for another name, and training could not tell what it was trained on."""
    for file in ("model.json", "model.safetensors"):
        write_bytes(f"{s3}/checkpoint/{file}", read_bytes(f"{saved[0]}/{file}"))
    assert check_start(same_for_workers(f"{s3}/checkpoint/"), settings_like(saved[1])).model_version


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.model_copy(update={"event_schema": EventSchema()}), "is not the settings' event_schema"),
        (lambda s: settings_like(small_model(), item_rows=77), "model.item_rows is .*, the settings say 77: set"),
        (lambda s: settings_like(small_model(), num_heads=1), "model.num_heads"),
        (
            lambda s: s.model_copy(update={"train": TrainSettings(tasks=(TASKS[0],))}),
            "its tasks are .* use the checkpoint's",
        ),
    ],
)
def test_training_does_not_start_from_weights_that_mean_something_else(
    saved: tuple[str, Longer], change: Callable[[Settings], Settings], says: str
) -> None:
    with pytest.raises(UserError, match=says) as refused:
        check_start(saved[0], change(settings_like(saved[1])))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "before", "after", "remedy"),
    [
        ({"encoding": "paper"}, {"history_events": 24}, {"history_events": 48}, "set model.history_events=24"),
        ({"queries": "learnable"}, {"query_groups": 4}, {"query_groups": 2}, "set model.query_groups=4"),
        ({"queries": "learnable"}, {"query_groups": 1}, {"query_groups": 4}, "set model.query_groups=1"),
    ],
)
def test_training_does_not_start_from_weights_that_do_not_fit_or_would_be_repeated_until_they_do(
    tmp_path: Path, kind: dict[str, Any], before: dict[str, Any], after: dict[str, Any], remedy: str
) -> None:
    """Workers would fail at them, start again and fail again; one learned query would become all queries without a word."""
    model = small_model(dtype=torch.float32, **{"stride_groups": 1, **kind, **before})
    save_weights(str(tmp_path), weights_of(model), model.settings, SCHEMA, TASKS)
    assert check_start(str(tmp_path), settings_like(model)).model_version
    with pytest.raises(UserError, match=rf"model.safetensors: .* the settings make it .*{remedy}") as refused:
        check_start(str(tmp_path), settings_like(model, **after))
    assert "\n" not in str(refused.value)


def test_of_equally_good_epochs_the_one_that_is_kept_is_the_one_that_is_published() -> None:
    done = [{"step": step, "score": score, "epochs": epochs} for step, score, epochs in
            ((2, 0.9, None), (4, 0.5, 1), (8, 0.5, 2), (12, 0.4, 3))]  # fmt: skip
    assert best_of_epochs(done[:1]) == []
    assert [best_of_epochs(done[:n])[0]["step"] for n in (2, 3, 4)] == [4, 4, 4]


def test_where_no_score_is_defined_the_epoch_that_has_trained_most_is_published() -> None:
    done = [{"step": step, "score": None, "epochs": epochs} for step, epochs in ((2, None), (4, 1), (8, 2), (9, None))]
    assert [[best["step"] for best in best_of_epochs(done[:n])] for n in (1, 2, 3, 4)] == [[], [4], [8], [8]]
    scored = [*done, {"step": 12, "score": 0.4, "epochs": 3}, {"step": 16, "score": None, "epochs": 4}]
    assert best_of_epochs(scored)[0]["step"] == 12
    one_class = {"label": {"auc": math.nan, "gauc": math.nan, "logloss": 0.5, "ne": math.nan}}
    assert selection_score(defined(one_class)) is None
    assert json.loads(json.dumps(defined(one_class), allow_nan=False))["label"]["logloss"] == 0.5


def test_a_trainer_state_of_another_format_is_refused_with_the_remedy(tmp_path: Path) -> None:
    save_trainer(str(tmp_path), {}, TrainerState())
    about = json.loads((tmp_path / "trainer.json").read_text())
    (tmp_path / "trainer.json").write_text(json.dumps({**about, "format_version": 2}))
    with pytest.raises(UserError, match=r"trainer.json: format version 2, this release reads 4: use the release that"):
        read_trainer_state(str(tmp_path))


def test_a_worker_resumes_with_its_rows_of_the_tables_and_with_all_of_the_rest(tmp_path: Path) -> None:
    directory, model, mine = str(tmp_path), small_model(seed=1), small_model(seed=2)
    save_weights(directory, weights_of(model), model.settings, SCHEMA, TASKS)
    tables = mine.large_tables()

    def own_rows(name: str) -> slice:
        return slice(3, 5) if name in tables else slice(None)

    for name, table in tables.items():
        table.embedding.weight = torch.nn.Parameter(table.embedding.weight[own_rows(name)].detach().clone())
    load_own_weights(directory, mine, own_rows)
    for name, tensor in model.state_dict().items():
        assert torch.equal(mine.state_dict()[name], tensor[own_rows(name)]), name
