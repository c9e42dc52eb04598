"""Tables whose rows are spread over workers learn what whole ones do. Two processes over gloo: starting them takes seconds.

With two GPUs, over NCCL and in CUDA graphs.
"""

import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from longer.arrays import RequestBatch
from longer.data.batches import Requests
from longer.model.longer import Longer
from longer.training.checkpoints import Tensors, save_weights, weights_of
from longer.training.loader import SplitData
from longer.training.steps import Stepper
from longer.training.trainer_state import TrainerState, load_own_weights, load_trainer, moments_of, save_trainer
from longer.training.validation import validate
from longer.training_settings import TaskSettings, TrainSettings
from tests.model.generate import SCHEMA, TASKS, random_candidates, random_histories, request_batch, small_model

NUM_WORKERS, NUM_STEPS, LATE_S = 2, 4, 1.0
ON_CUDA = torch.cuda.device_count() >= NUM_WORKERS
DTYPE = torch.float32 if ON_CUDA else torch.float64
CLOSE = {"rtol": 1e-3, "atol": 1e-3} if ON_CUDA else {"rtol": 1e-8, "atol": 1e-10}
TRAIN: dict[str, Any] = {"tasks": (TaskSettings(name="click"),), "clip_norm": 0.05}
"""A norm that clips: updates then depend on the gradients of all workers."""


@dataclass
class Outcome:
    """What the first worker saw: the loss and gradient norm of each step, outputs, and the whole state in the end."""

    losses_and_norms: list[tuple[float, float]]
    outputs_CT: np.ndarray
    metrics: dict[str, dict[str, float]]
    weights: Tensors
    moments: Tensors
    num_item_rows: int
    skips: bool
    waited: str
    """Where the host waited for its device within a step."""

    phases_s: dict[str, float]
    """Where the time of a step went for which the second worker laid its batch out too late."""


def batches_of(model: Longer, step: int, rank: int) -> list[RequestBatch]:
    """Two batches for each worker; in the last step the second worker has few users and borrows its second batch."""
    sizes = [[3], [20]] if (step, rank) == (NUM_STEPS - 1, 1) else [[20, 5, 0, 11]] * 2
    return [request_batch(model, 100 * step + 10 * rank + number, lengths) for number, lengths in enumerate(sizes)]


def one_users_requests(model: Longer) -> SplitData:
    """Two requests of one user, whom one worker alone scores in validation."""
    rng, rows = np.random.default_rng(3), np.zeros(2, np.int64)
    histories, candidates = random_histories(rng, [20]), random_candidates(rng, [9, 8])
    requests = Requests(
        request_id_R=np.arange(2),
        user_id_R=pa.array([7, 7]),
        user_key_R=histories.user_key_B[rows],
        request_ts_R=rows + 2_000_000_000_000,
        history_end_R=np.array([19, 20]),
        candidates=candidates,
        item_id_C=pa.array(range(17)),
        labels={"click": (np.arange(17) % 2).astype(np.float32)},
    )
    return SplitData(histories, requests, rows, model.windows)


def outcome_of(stepper: Stepper, rank: int) -> Outcome:
    steps, model = [], cast(Longer, stepper.model)
    for step in range(NUM_STEPS):
        weights = [1.0, 0.0 if (step, rank) == (NUM_STEPS - 1, 1) else 1.0]
        staged = [stepper.staged(batch) for batch in batches_of(model, step, rank)]
        loss, norm = stepper.step(staged, weights, num_candidates=300)
        dist.all_reduce(loss)
        steps.append((float(loss), float(norm)))
    outputs_CT = stepper.outputs(request_batch(model, 5 + rank, [4, 19]))
    data = one_users_requests(model)
    metrics = validate(data, data.packs(16), stepper.outputs, TRAIN["tasks"], rank, NUM_WORKERS)
    whole = weights_of(model, stepper.whole), moments_of(model, stepper.optimizer, stepper.whole)
    num_item_rows = len(model.embedding.item.embedding.weight)
    skips = skips_if_one_overflows(stepper, rank)
    phases_s = phases_beside_a_late_worker(stepper, rank)
    return Outcome(steps, outputs_CT, metrics, *whole, num_item_rows, skips, waits(stepper, rank), phases_s)


def phases_beside_a_late_worker(stepper: Stepper, rank: int) -> dict[str, float]:
    batches = batches_of(cast(Longer, stepper.model), 0, rank)
    stepper.timer.take()
    if rank == 1:
        time.sleep(LATE_S)
    stepper.step([stepper.staged(batch) for batch in batches], [1.0, 1.0], num_candidates=300)
    return stepper.timer.take()


def waits(stepper: Stepper, rank: int) -> str:
    """Where the host waits for its device in a step that needs no capture; nowhere on a CPU."""
    if not ON_CUDA:
        return ""
    batches = batches_of(cast(Longer, stepper.model), 0, rank)
    for batch in batches:  # so that one capture holds them all
        stepper.staged(batch)
    first, second = ([stepper.staged(batch) for batch in batches] for _ in range(2))
    stepper.step(first, [1.0, 1.0], num_candidates=300)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepper.step(second, [1.0, 1.0], num_candidates=300)
    except RuntimeError:
        return traceback.format_exc()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def skips_if_one_overflows(stepper: Stepper, rank: int) -> bool:
    """Whether no worker changes a weight in a step in which rows that the second one alone reads and owns overflow."""
    optimizer, before = stepper.optimizer, [parameter.detach().clone() for parameter in stepper.model.parameters()]
    optimizer.zero_grad()
    tables = stepper.model.large_tables()
    row = {name: table.num_rows - 1 if rank == 1 else 1 for name, table in tables.items()}
    assert optimizer.exchange
    keys = {name: np.array([number - 1 or tables[name].num_rows - 1]) for name, number in row.items()}
    held = optimizer.exchange.begin(optimizer.exchange.announce(keys))
    for parameter in stepper.model.parameters():
        if table := optimizer.tables.get(parameter):
            gradient_Ud = torch.full_like(parameter[:1], torch.inf if rank == 1 else 1.0)
            read = 0 if held else table.num_rows - 1 if rank == 1 else 1
            cast(list, table.reads).append((torch.full((1,), read, device=parameter.device), gradient_Ud))
        else:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    same = all(torch.equal(old, new) for old, new in zip(before, stepper.model.parameters(), strict=True))
    by_worker = [same] * NUM_WORKERS
    dist.all_gather_object(by_worker, same)
    return all(by_worker)


def one_workers_steps(folder: str) -> tuple[list[tuple[float, float]], Tensors]:
    """Losses, norms and weights of one worker that takes both workers' batches."""
    model = small_model(dtype=DTYPE)
    stepper = Stepper(model, TrainSettings(**TRAIN), torch.device("cpu"), 1)
    load_own_weights(folder, model)
    load_trainer(folder, model, stepper.optimizer)
    steps = []
    for step in range(NUM_STEPS):
        batches = [batch for rank in range(NUM_WORKERS) for batch in batches_of(model, step, rank)]
        last = 0.0 if step == NUM_STEPS - 1 else 1.0
        loss, norm = stepper.step(batches, [1.0, 1.0, 1.0, last], num_candidates=300)
        steps.append((float(loss), float(norm)))
    return steps, weights_of(model)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    device = torch.device("cuda", rank) if ON_CUDA else torch.device("cpu")
    if ON_CUDA:
        torch.cuda.set_device(device)
    backend, meet = "nccl" if ON_CUDA else "gloo", f"file://{folder}/meet"
    waits = timedelta(seconds=100)  # where workers are not in step
    dist.init_process_group(backend, meet, timeout=waits, rank=rank, world_size=NUM_WORKERS)
    for sharding in ("replicated", "rows"):
        model = small_model(dtype=DTYPE)
        stepper = Stepper(model, TrainSettings(**TRAIN, table_sharding=sharding), device, NUM_WORKERS)
        load_own_weights(folder, model, stepper.own_rows)
        load_trainer(folder, model, stepper.optimizer, stepper.own_rows)
        outcome = outcome_of(stepper, rank)
        if rank == 0:
            torch.save(outcome, f"{folder}/{sharding}")
    dist.destroy_process_group()
    if rank == 0:
        torch.save(one_workers_steps(folder), f"{folder}/alone")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Outcome]:
    """Of whole tables and of spread ones, both going on from one worker's checkpoint."""
    folder, model = tmp_path_factory.mktemp("sharding"), small_model(dtype=DTYPE)
    stepper = Stepper(model, TrainSettings(**TRAIN), torch.device("cpu"), 1)
    stepper.step(batches_of(model, 0, 1), [1.0, 1.0], num_candidates=300)
    save_weights(str(folder), weights_of(model), model.settings, SCHEMA, TASKS)
    save_trainer(str(folder), moments_of(model, stepper.optimizer), TrainerState())
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=NUM_WORKERS)
    return tuple(torch.load(Path(folder) / name, weights_only=False) for name in ("replicated", "rows"))  # type: ignore[return-value]


def test_each_worker_holds_its_rows_only(outcomes: tuple[Outcome, Outcome]) -> None:
    replicated, rows = outcomes
    assert (replicated.num_item_rows, rows.num_item_rows) == (31, 15)


def test_spread_tables_learn_what_whole_ones_do(outcomes: tuple[Outcome, Outcome]) -> None:
    replicated, rows = outcomes
    assert all(norm > TRAIN["clip_norm"] for _, norm in replicated.losses_and_norms)
    np.testing.assert_allclose(rows.losses_and_norms, replicated.losses_and_norms, rtol=CLOSE["rtol"])
    np.testing.assert_allclose(rows.outputs_CT, replicated.outputs_CT, rtol=1e-5, atol=max(1e-6, CLOSE["atol"]))


def test_two_workers_learn_what_one_does_from_both_their_batches(
    outcomes: tuple[Outcome, Outcome], tmp_path_factory: pytest.TempPathFactory
) -> None:
    steps, weights = torch.load(tmp_path_factory.getbasetemp() / "sharding0" / "alone")
    np.testing.assert_allclose(outcomes[0].losses_and_norms, steps, rtol=max(1e-6, CLOSE["rtol"]))  # losses are float32
    for name, tensor in weights.items():
        torch.testing.assert_close(outcomes[0].weights[name], tensor, **CLOSE, msg=name)


@pytest.mark.skipif(not ON_CUDA, reason="nobody waits for a CPU")
def test_no_step_waits_for_its_device(outcomes: tuple[Outcome, Outcome]) -> None:
    assert [outcome.waited for outcome in outcomes] == ["", ""]


def test_gradients_that_overflow_on_one_owner_make_every_worker_skip_the_step(
    outcomes: tuple[Outcome, Outcome],
) -> None:
    assert [outcome.skips for outcome in outcomes] == [True, True]


def test_the_wait_for_another_workers_data_is_told_from_this_workers_own_work(
    outcomes: tuple[Outcome, Outcome],
) -> None:
    for outcome in outcomes:
        assert set(outcome.phases_s) == {"others_wait", "forward", "backward", "exchange", "optimizer"}
        assert 0.8 * LATE_S < outcome.phases_s["others_wait"] < 2 * LATE_S
        assert outcome.phases_s["forward"] + outcome.phases_s["backward"] < 0.8 * LATE_S


def test_a_worker_with_nothing_to_validate_lends_its_rows_to_the_others(outcomes: tuple[Outcome, Outcome]) -> None:
    replicated, rows = outcomes
    assert rows.metrics["click"] == pytest.approx(replicated.metrics["click"], rel=1e-3)
    assert 0 < rows.metrics["click"]["auc"] < 1


def test_a_checkpoint_of_spread_tables_is_the_one_of_whole_ones(outcomes: tuple[Outcome, Outcome]) -> None:
    replicated, rows = ({**outcome.weights, **outcome.moments} for outcome in outcomes)
    assert rows.keys() == replicated.keys()
    for name, tensor in replicated.items():
        torch.testing.assert_close(rows[name], tensor, **CLOSE, msg=name)
