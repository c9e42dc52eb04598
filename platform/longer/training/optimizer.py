"""AdamW on the dense layers; on large tables Adam of the rows that a step read, and nothing of the others.

Side features' tables count as dense layers without decay: `model.categorical_rows` bounds what a pass over them costs.

U rows of a large table that were read, d their width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from longer.model.fuse import has_kernels
from longer.model.ranker import Ranker
from longer.training.exchange import ReplicatedTables
from longer.training.scaling import Scaling
from longer.training.sharding import ShardedTables, over_owners
from longer.training.table_gradients import TableGradient, combine
from longer.training.timing import PhaseTimer
from longer.training_settings import TrainSettings

_BETAS, _EPS = (0.9, 0.999), 1e-8


class Gradients(NamedTuple):
    """Of dense parameters, this worker's, and of the rows of large tables that were read, all workers'."""

    dense: dict[nn.Parameter, Tensor]
    tables: dict[nn.Parameter, TableGradient]


class Optimizer:
    """Takes the place of a model's gradients and moments; the model's large tables note what they read from now on.

    A table's row whose gradient is zero, because nobody read it or nothing came of it, keeps its weights and moments (torch's
    SparseAdam does the same). Moments lie in `state` under their parameter: a step touches no row that it did not read. A step
    whose gradients are not finite changes no weight and no moment; `scaling` counts it. With an `exchange`, gradients are summed
    over all workers, and `timer` tells that, with the wait for the slowest worker, from the update.
    """

    def __init__(
        self, model: Ranker, settings: TrainSettings, exchange: ReplicatedTables | ShardedTables | None = None
    ) -> None:
        self.exchange = exchange
        self.timer = PhaseTimer(model.norm_head.weight.device)
        self.model, self.clip_norm = model, settings.clip_norm
        self.tables = {model.get_parameter(name): table for name, table in model.large_tables().items()}
        for table in self.tables.values():
            table.reads = []
        device = model.norm_head.weight.device
        on_cuda = device.type == "cuda"
        self.scaling = Scaling(device, is_scaled=settings.precision == "fp16")

        def rate(value: float) -> Tensor | float:
            return torch.tensor(value, device=device) if on_cuda else value

        self._dense = torch.optim.AdamW(
            [
                {
                    "params": model.dense_parameters(),
                    "lr": rate(settings.learning_rate),
                    "peak_lr": settings.learning_rate,
                },
                {
                    "params": model.embedding_parameters(),
                    "lr": rate(settings.embedding_learning_rate),
                    "peak_lr": settings.embedding_learning_rate,
                    "weight_decay": 0.0,
                },
            ],
            weight_decay=settings.weight_decay,
            betas=_BETAS,
            eps=_EPS,
            fused=True,
            capturable=on_cuda,
        )
        self.state = self._dense.state
        for parameter in self.tables:
            self.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def set_rate_share(self, share: float) -> None:
        """Learning rates are this share of their peaks from now on."""
        for group in self._dense.param_groups:
            rate = group["peak_lr"] * share
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def zero_grad(self) -> None:
        self._dense.zero_grad(set_to_none=True)
        for table in self.tables.values():
            assert table.reads is not None
            table.reads.clear()

    def taken(self) -> Gradients:
        """What the backward passes since `zero_grad` left; there is nothing left afterwards."""
        dense = {p: p.grad.clone() for group in self._dense.param_groups for p in group["params"] if p.grad is not None}
        with self._exchanging():
            taken = Gradients(dense, self._of_tables())
        self.zero_grad()
        return taken

    def _of_tables(self) -> dict[nn.Parameter, TableGradient]:
        mine = {parameter: combine(table.reads) for parameter, table in self.tables.items() if table.reads}
        return dict(zip(mine, self.exchange.summed([*mine.values()]), strict=True)) if self.exchange else mine

    @torch.no_grad()
    def step(self, earlier: Sequence[Gradients] = ()) -> Tensor:
        """One update from the gradients of now and those `taken` earlier; returns their norm before it was clipped.

        They are those of `scaling.scale` times the loss.
        """
        with self._exchanging():
            gradients = self._summed(earlier)
        with self.timer.phase("optimizer"):
            return self._updated([*gradients.dense.values()], gradients.tables)

    def _exchanging(self) -> AbstractContextManager[None]:
        return self.timer.phase("exchange" if self.exchange else "optimizer")

    def _summed(self, earlier: Sequence[Gradients]) -> Gradients:
        """Of all batches and workers; dense ones are the parameters' too."""
        for gradients in earlier:
            for parameter, dense_gradient in gradients.dense.items():
                parameter.grad = dense_gradient if parameter.grad is None else parameter.grad.add_(dense_gradient)
        dense = {p: p.grad for group in self._dense.param_groups for p in group["params"] if p.grad is not None}
        on_its_way = _OverWorkers([*dense.values()]) if self.exchange else None
        by_batch = [*(gradients.tables for gradients in earlier), self._of_tables()]
        tables = {p: _together([found[p] for found in by_batch if p in found]) for p in by_batch[-1]}
        if on_its_way:
            on_its_way.wait()
        return Gradients(dense, tables)

    def _updated(self, dense: list[Tensor], tables: dict[nn.Parameter, TableGradient]) -> Tensor:
        of_tables = get_total_norm([gradient.gradient_Ud for gradient in tables.values()], foreach=True)
        if isinstance(self.exchange, ShardedTables):
            of_tables = over_owners(of_tables)
        norm = torch.hypot(get_total_norm(dense, foreach=True), of_tables).float() / self.scaling.scale
        is_finite = norm.isfinite()
        divisor = ((norm + 1e-6) / self.clip_norm).clamp_min(1.0) * self.scaling.scale
        self._dense.grad_scale, self._dense.found_inf = divisor, 1.0 - is_finite.float()  # type: ignore[attr-defined]
        self._dense.step()
        scale, rate = 1.0 / divisor, self._dense.param_groups[1]["lr"]
        for parameter, gradient in tables.items():
            num_rows = torch.where(is_finite, gradient.num_rows, 0)
            self.state[parameter]["step"] += is_finite
            self._update(parameter, gradient, num_rows, scale, rate)
        self.scaling.update(is_finite)
        return norm

    def _update(
        self, parameter: Tensor, gradient: TableGradient, num_rows: Tensor, scale: Tensor, rate: Tensor | float
    ) -> None:
        state = self.state[parameter]
        moments = state["exp_avg"], state["exp_avg_sq"]
        if has_kernels(parameter):
            from longer.training.table_triton import update_rows

            assert isinstance(rate, Tensor)
            rows = gradient.rows_U, gradient.gradient_Ud, num_rows
            update_rows(parameter, moments, *rows, scale, rate, state["step"], _BETAS, _EPS)
            return
        learns_U = gradient.gradient_Ud.any(dim=1)
        learns_U[int(num_rows) :] = False
        rows_U, gradient_Ud = gradient.rows_U[learns_U], gradient.gradient_Ud[learns_U] * scale
        mean_Ud = moments[0][rows_U].lerp_(gradient_Ud, 1 - _BETAS[0])
        square_Ud = moments[1][rows_U].mul_(_BETAS[1]).addcmul_(gradient_Ud, gradient_Ud, value=1 - _BETAS[1])
        moments[0][rows_U], moments[1][rows_U] = mean_Ud, square_Ud
        bias_mean, bias_square = (1 - beta ** state["step"] for beta in _BETAS)
        root_Ud = square_Ud.sqrt_().div_(bias_square.sqrt()).add_(_EPS)
        parameter.index_add_(0, rows_U, mean_Ud / root_Ud * (-rate / bias_mean))


class _OverWorkers:
    """Gradients on their way to become all workers' sum, in place, as one message; `wait` has the device wait, not the host."""

    def __init__(self, gradients: list[Tensor]) -> None:
        self._gradients, self._flat = gradients, torch._utils._flatten_dense_tensors(gradients)
        self._work = dist.all_reduce(self._flat, async_op=True)

    def wait(self) -> None:
        self._work.wait()
        summed = torch._utils._unflatten_dense_tensors(self._flat, self._gradients)
        torch._foreach_copy_(self._gradients, summed)


def _together(by_batch: Sequence[TableGradient]) -> TableGradient:
    """The sum of a table's gradients in several batches."""
    return by_batch[0] if len(by_batch) == 1 else combine([(x.rows_U, x.gradient_Ud) for x in by_batch])
