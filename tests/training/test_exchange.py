"""What workers tell each other of the rows of tables, whole and spread, against sums over whole tables. Three processes over gloo.

Starting them takes seconds.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from longer.model.longer import Longer
from longer.training.exchange import NO_ROW, ReplicatedTables, distinct
from longer.training.sharding import ShardedTables
from longer.training.table_gradients import combine, joined
from tests.model.generate import small_model

NUM_WORKERS = 3
CPU = torch.device("cpu")
READS = [
    [range(0, 20), range(15, 31), range(28, 31)],  # some rows of two workers, some of one
    [range(0, 31), [], [7]],  # the second worker reads nothing
    [[4], [4], [4]],  # all read one row: two owners of spread tables are asked for nothing
    [[], [], []],
]
"""Rows that each worker reads of every table, batch by batch."""


def reads_of(model: Longer, batch: int, rank: int) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Announced rows of each table, of which the first of several is not read, and what is noted of them: some rows twice."""
    rng = np.random.default_rng([batch, rank])
    announced, noted = {}, []
    for name, table in model.large_tables().items():
        rows = np.array([row for row in READS[batch][rank] if row < table.num_rows], np.int64)
        announced[name] = torch.from_numpy(rows)
        of_those = rows[1:] if len(rows) > 1 else rows
        read = torch.from_numpy(rng.permutation(np.concatenate([of_those, of_those[: len(rows) // 2]])))
        width = table.embedding.embedding_dim
        noted.append((read, torch.from_numpy(rng.normal(size=(len(read), width)).astype(np.float32))))
    return announced, noted


def keys_of(model: Longer, rows: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Keys whose rows these are."""
    keys = {}
    for name, table in model.large_tables().items():
        keys[name] = np.where(rows[name] == 0, 0, rows[name] - 1 + table.num_rows - 1)
        assert torch.equal(table.rows_of(torch.from_numpy(keys[name])), rows[name])
    return keys


def exchanged(exchange: ReplicatedTables | ShardedTables, model: Longer, rank: int) -> list[list[Any]]:
    """Batch by batch, by table: the rows that were lent, and the sum of all workers' gradients as a table of zeros else."""
    batches = [reads_of(model, batch, rank) for batch in range(len(READS))]
    ahead = [exchange.announce(keys_of(model, rows)) for rows, _ in batches]  # all of them before the first is taken
    found = []
    for (rows, noted), told in zip(batches, ahead, strict=True):
        held = exchange.begin(told)
        mine = []
        for name, (read, gradient) in zip(rows, noted, strict=True):
            place = torch.searchsorted(held[name].rows_U, read) if held else read
            mine.append(combine([(place, gradient)]))
        of_batch = []
        for name, gradient in zip(rows, exchange.summed(mine), strict=True):
            weight = model.get_parameter(name)
            table = torch.zeros(weight.shape).index_add_(0, gradient.rows_U.long(), gradient.gradient_Ud)
            assert gradient.rows_U[: int(gradient.num_rows)].diff().gt(0).all()
            of_batch.append((held[name].weight_Ud.clone() if held else None, table))
        found.append(of_batch)
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=NUM_WORKERS)
    outcomes = {}
    for sent_as in (None, torch.bfloat16):
        model = small_model(dtype=torch.float32)
        outcomes["replicated", sent_as] = exchanged(ReplicatedTables(model, CPU, sent_as), model, rank)
        outcomes["rows", sent_as] = exchanged(ShardedTables(model, CPU, sent_as), model, rank)
    torch.save(outcomes, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, Any], Any]]:
    """By worker."""
    folder = tmp_path_factory.mktemp("exchange")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=NUM_WORKERS)
    return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(NUM_WORKERS)]


def parts_of(model: Longer, batch: int) -> list[Tensor]:
    """[workers, rows, d] of each table: every worker's own sums, exact."""
    parts = [torch.zeros(NUM_WORKERS, *model.get_parameter(name).shape).double() for name in model.large_tables()]
    for rank in range(NUM_WORKERS):
        for part_WNd, (read, gradient) in zip(parts, reads_of(model, batch, rank)[1], strict=True):
            part_WNd[rank].index_add_(0, read, gradient.double())
    return parts


@pytest.mark.parametrize("sent_as", [None, torch.bfloat16])
def test_every_worker_has_the_sum_of_all_workers_gradients_whatever_each_of_them_read(
    outcomes: list[dict[tuple[str, Any], Any]], sent_as: torch.dtype | None
) -> None:
    """Sent as bf16, each worker's part is rounded once, by 2^-8 of itself at most; their sum is not, but to float32."""
    model = small_model(dtype=torch.float32)
    for batch in range(len(READS)):
        for table, part_WNd in enumerate(parts_of(model, batch)):
            as_sent = part_WNd.float().to(sent_as or torch.float32).double().sum(0)
            whole = [outcome["replicated", sent_as][batch][table][1] for outcome in outcomes]
            assert all(torch.equal(whole[0], other) for other in whole)  # to the bit: weights would drift apart
            spread = torch.cat([outcome["rows", sent_as][batch][table][1] for outcome in outcomes])
            for summed in (whole[0].double(), spread.double()):
                error, most = (summed - part_WNd.sum(0)).abs(), part_WNd.abs().sum(0)
                assert (error <= (2**-8 if sent_as else 1e-6) * most + 1e-6).all()
                torch.testing.assert_close(summed, as_sent, rtol=1e-5, atol=2e-6)


def test_lent_rows_are_the_owners_weights_to_the_bit(outcomes: list[dict[tuple[str, Any], Any]]) -> None:
    model = small_model(dtype=torch.float32)
    for rank, batch in np.ndindex(NUM_WORKERS, len(READS)):
        rows = reads_of(model, batch, rank)[0]
        for table, (name, rows_U) in enumerate(rows.items()):
            lent = outcomes[rank]["rows", torch.bfloat16][batch][table][0]
            assert torch.equal(lent, model.get_parameter(name).detach()[rows_U])


@pytest.mark.parametrize("num_rows", [1, 50, 100_000])
def test_distinct_rows_ascend_however_large_the_table_is(num_rows: int) -> None:
    rows_E = np.random.default_rng(0).integers(0, num_rows, 40)
    assert distinct(rows_E, num_rows).tolist() == sorted(set(rows_E.tolist()))


@pytest.mark.parametrize(
    "rows_WU", [[[0, 3, 9], [3, 4, NO_ROW], [9, NO_ROW, NO_ROW]], [[5], [5]], [[NO_ROW], [NO_ROW]]]
)
def test_rows_joined_for_kernels_are_those_joined_by_torch(rows_WU: list[list[int]]) -> None:
    rows_N = torch.tensor(rows_WU, dtype=torch.int32).flatten()
    gradient_Nd = torch.randn(len(rows_N), 2, generator=torch.Generator().manual_seed(0))
    gradient_Nd[rows_N == NO_ROW] = torch.nan  # whatever stands there is read by nobody
    by_torch, for_kernels = (joined(rows_N, in_kernels, NO_ROW) for in_kernels in (False, True))
    num, bounds_N1 = int(for_kernels.num_rows), for_kernels.bounds_N1
    assert bounds_N1 is not None
    assert for_kernels.rows_U[:num].tolist() == by_torch.rows_U.tolist()
    summed_Nd = torch.stack([gradient_Nd[for_kernels.order_N[a:b]].sum(0) for a, b in bounds_N1.unfold(0, 2, 1)])
    torch.testing.assert_close(summed_Nd[:num], by_torch.sum(gradient_Nd, torch.float32).gradient_Ud)
    assert not summed_Nd[num:].any()
