"""What every model shares: embeddings, heads, and the candidate x history features, around an encoder of the history.

B histories, R requests, C candidates in all requests, D width, F interaction features.
"""

from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from longer.model.attention import Block
from longer.model.context import take_rows
from longer.model.embedding import Embedding
from longer.model.fuse import fused_on_cuda, has_kernels
from longer.model.hashed_table import HashedTable
from longer.model.inputs import BatchTensors, RequestTensors
from longer.model.interactions import CandidateIndex, InteractionIndex, num_features
from longer.model_settings import ModelSettings
from longer.schema import EventSchema
from longer.training_settings import TaskSettings


class Ranker(nn.Module):
    """Scores candidates against user histories. Weights come from torch's global generator: seed it first."""

    read_width: int = 0
    """Width of what the head reads of the history beside the candidate's token and its interaction features."""

    def __init__(self, settings: ModelSettings, schema: EventSchema, tasks: tuple[TaskSettings, ...]):
        super().__init__()
        self.settings, self.schema, self.tasks = settings, schema, tasks
        self.windows = settings.windows
        width = settings.width
        self.embedding = Embedding(settings, schema)
        self._make_encoder()
        self.interaction_fields = ("item_id", *schema.features_of("item", "categorical"))
        num_interactions = (
            num_features(len(self.interaction_fields), settings.count_events) if settings.interactions else 0
        )
        if settings.interactions:
            last = nn.Linear(width, width)
            nn.init.zeros_(last.weight)  # so that candidates begin as their items, which the first layer searches for
            nn.init.zeros_(last.bias)
            self.interaction_token = nn.Sequential(nn.Linear(num_interactions, width), nn.GELU(), last)
        self.norm_head = nn.LayerNorm(width)
        self.head = nn.Sequential(
            nn.Linear(width + self.read_width + num_interactions, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, len(tasks)),
        )
        self.item_bias = HashedTable(settings.item_rows, len(tasks), std=0.01)

    def _make_encoder(self) -> None:
        """Adds the modules that read the history."""
        raise NotImplementedError

    def forward(self, batch: BatchTensors) -> Tensor:
        """[C, tasks]: logits of binary tasks, values of regression tasks, for every candidate of every request."""
        raise NotImplementedError

    def cells_per_candidate(self, num_events: int) -> int:
        """Numbers that a candidate takes where it reads so many events in the forward pass of a model without user states."""
        raise NotImplementedError

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Those of tables that are trained."""
        tables = [cast(nn.Parameter, m.weight) for m in self.modules() if isinstance(m, nn.Embedding)]
        return [p for p in tables if p.requires_grad]

    def dense_parameters(self) -> list[nn.Parameter]:
        """All others that are trained."""
        tables = {id(p) for p in self.embedding_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in tables]

    def set_recompute(self, recompute: bool) -> None:
        """Whether layers and groups forget their activations and compute them again in the backward pass."""
        for module in self.modules():
            if isinstance(module, Block | Embedding):
                module.recompute = recompute

    def large_tables(self) -> dict[str, HashedTable]:
        """The tables that grow with items and users, by the name of their parameter."""
        tables = {
            "embedding.item.embedding.weight": self.embedding.item,
            "embedding.user.embedding.weight": self.embedding.user,
            "item_bias.embedding.weight": self.item_bias,
        }
        return {name: table for name, table in tables.items() if table is not None}

    def keys_read(
        self, item_key_E: npt.NDArray, item_key_C: npt.NDArray, user_key_B: npt.NDArray
    ) -> dict[str, npt.NDArray]:
        """What a batch of these events, candidates and users reads of each large table."""
        keys = {
            "embedding.item.embedding.weight": np.concatenate([item_key_E, item_key_C]),
            "embedding.user.embedding.weight": user_key_B,
            "item_bias.embedding.weight": item_key_C,
        }
        return {name: keys[name] for name in self.large_tables()}

    def enter(
        self, request_RD: Tensor, request_C: Tensor, features_CF: Tensor | None, candidates: dict[str, Tensor]
    ) -> Tensor:
        """[C, D]: candidates as tokens, each with what is known of its request and of itself in the history."""
        id_Cd = self.embedding.item(candidates["item_id"])  # outside of compiled code, as that of events
        return self._enter(id_Cd, request_RD, request_C, features_CF, candidates)

    @fused_on_cuda
    def _enter(
        self,
        id_Cd: Tensor,
        request_RD: Tensor,
        request_C: Tensor,
        features_CF: Tensor | None,
        candidates: dict[str, Tensor],
    ) -> Tensor:
        x_CD = self.embedding.candidates(candidates, id_Cd) + take_rows(request_RD, request_C)
        x_CD = self.embedding.with_request_features(x_CD, candidates)
        return x_CD if features_CF is None else x_CD + self.interaction_token(features_CF)

    def leave(self, x_CD: Tensor, features_CF: Tensor | None, item_key_C: Tensor) -> Tensor:
        """[C, tasks]: outputs from what the candidates have gathered, in the weights' type.

        Whatever products are computed in, outputs are not rounded to it: bf16 would not tell log-odds apart that lie 0.03 from
        each other, those of rare clicks.
        """
        bias_CT = self.item_bias(item_key_C)
        if has_kernels(x_CD) and not torch.is_grad_enabled():
            return self._outputs(x_CD, features_CF, bias_CT)
        hidden_CW, last = self._leave(x_CD, features_CF), cast(nn.Linear, self.head[-1])
        with torch.autocast(hidden_CW.device.type, enabled=False):
            return last(hidden_CW.to(last.weight.dtype)) + bias_CT

    @fused_on_cuda
    def _outputs(self, x_CD: Tensor, features_CF: Tensor | None, bias_CT: Tensor) -> Tensor:
        """The same in one kernel behind `head`'s first product: few outputs are sums rather than a product of matrices."""
        last = cast(nn.Linear, self.head[-1])
        hidden_CW = self._leave(x_CD, features_CF).to(last.weight.dtype)
        return (hidden_CW[:, None] * last.weight).sum(-1) + last.bias + bias_CT

    @fused_on_cuda
    def _leave(self, x_CD: Tensor, features_CF: Tensor | None) -> Tensor:
        x_CD = self.norm_head(x_CD)
        if features_CF is not None:
            x_CD = torch.cat([x_CD, features_CF.to(x_CD.dtype)], dim=-1)
        return self.head[1](self.head[0](x_CD))

    def interactions(
        self, index: CandidateIndex, batch: RequestTensors, row_C: Tensor, request_C: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """[C, F]: counts and ages of each candidate's item and categories in its request's history window."""
        keys = [batch.candidates[name] for name in self.interaction_fields]
        begin_C, end_C, ts_C, keys_CF = self._interaction_reads(
            batch.history_end_R, batch.request_ts_R, request_C, keys
        )
        return index.features(row_C, begin_C, end_C, ts_C, keys_CF, self.settings.count_events, dtype)

    @fused_on_cuda
    def _interaction_reads(
        self, history_end_R: Tensor, request_ts_R: Tensor, request_C: Tensor, keys: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Of each candidate: first and last event of the history window, time of the request, and keys of its fields."""
        begin_R = self.windows.history_start(history_end_R) * self.windows.merge_size
        return begin_R[request_C], history_end_R[request_C], request_ts_R[request_C], torch.stack(keys, dim=-1)

    def entered(self, batch: BatchTensors) -> tuple[Tensor, Tensor | None]:
        """`enter` for all candidates of a whole batch, [C, D], and their interaction features."""
        request_C = batch.request_of_candidate_C
        last_ts_R = batch.histories.last_ts_R(batch.row_R, batch.history_end_R)
        request_RD = self.embedding.requests(batch.request_ts_R, last_ts_R)
        features_CF = self.batch_interactions(batch, request_C, request_RD.dtype)
        return self.enter(request_RD, request_C, features_CF, batch.candidates), features_CF

    def batch_interactions(self, batch: BatchTensors, request_C: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The same for a whole batch; None where they are switched off."""
        if not self.settings.interactions:
            return None
        index = InteractionIndex.build(batch.histories, self.interaction_fields)
        return self.interactions(index, batch, batch.row_R[request_C], request_C, dtype)
