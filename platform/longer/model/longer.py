"""LONGER (arXiv 2505.04421) with an appendable encoding: cross-causal, then self-causal attention over merged groups.

Notable:
- a user's full groups form a `Context`: computed once, extended as groups arrive, shared by all requests and candidates;
- the newest partial group and the user globals form a request's `Tail`; candidates see context, tail and themselves;
- training, `encode`, `append` and `score` are the same three steps (extend, tail, candidates) on different numbers of groups;
- the last layer needs only keys and values of groups and globals: nothing reads what they would gather there.

B histories, E events in all of them, N full groups in all of them (flat), G context groups (padded), Q query-window groups
(padded), T = 1 + M tail tokens, R requests, C candidates in all requests, P computed groups of all histories or tail tokens of all
requests (flat), S = T + 1 tokens that a candidate sees beside the context, F interaction features, D width, H heads, Z = D/H,
K events in a group, d event width.
"""

from typing import cast

import torch
from torch import Tensor, nn

from longer.model.attention import Block, attend_groups
from longer.model.context import Context, SharedContext, Tail, ranges, row_offsets, splice, take_rows
from longer.model.cpu_layers import candidate_layer, tail_layer
from longer.model.flat import flat_forward
from longer.model.fuse import fused_on_cuda, has_kernels
from longer.model.inputs import BatchTensors, EventTensors, RequestTensors
from longer.model.interactions import CandidateIndex, InteractionIndex
from longer.model.ranker import Ranker
from longer.model.recompute import run
from longer.model.shared_attention import Readers, attend
from longer.model.variants import Variant, variant_forward
from longer.model.visibility import CANDIDATE, GLOBAL, GROUP, visible


class Longer(Ranker):
    """LONGER with every part by a switch. Weights come from torch's global generator: seed it first."""

    def _make_encoder(self) -> None:
        settings = self.settings
        self.blocks = nn.ModuleList(
            Block(settings.width, settings.num_heads, settings.feed_forward_ratio, settings.dropout)
            for _ in range(settings.num_self_layers + 1)
        )
        self.layers[0].make_search(self.embedding.request_D)
        if not settings.is_appendable:
            self.variant = Variant(settings)

    @property
    def layers(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def turns(self, position_T: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Cosine and sine of each position's angles for each layer: the first has its own, the others share one."""
        first, *others = self.layers
        turns = [first.rotation.turn(position_T, dtype)]
        return turns + [others[0].rotation.turn(position_T, dtype)] * len(others) if others else turns

    @property
    def has_flat_pass(self) -> bool:
        """Whether the flat pass on CUDA computes this model."""
        return self.settings.is_appendable

    def cells_per_candidate(self, num_events: int) -> int:
        """Its scores, weights and mask over every group, of one layer."""
        return 3 * self.settings.num_heads * self.windows.num_groups(num_events)

    def forward(self, batch: BatchTensors) -> Tensor:
        """[C, tasks]: logits of binary tasks, values of regression tasks, for every candidate of every request."""
        histories, windows = batch.histories, self.windows
        if not self.settings.is_appendable:
            return variant_forward(self, batch)
        if has_kernels(self.norm_head.weight) and len(histories.event_ts_E):
            return flat_forward(self, batch.source, histories.event_ts_E.device)
        recompute = self.embedding.recompute
        x_Ed = run(self.embedding.events, histories, recompute=recompute)
        x_ND = run(self.full_groups, histories, x_Ed, recompute=recompute)
        first_B = histories.first_index_B // windows.merge_size
        end_B = (histories.first_index_B + histories.num_events_B) // windows.merge_size
        query_first_B = windows.query_start(histories.first_index_B + histories.num_events_B)
        context = self.extend(None, x_ND, end_B - first_B, first_B, query_first_B)
        tail = self.tail(
            context,
            batch.row_R,
            batch.history_end_R,
            histories.user_key_B[batch.row_R],
            *self.partial_groups(histories, x_Ed, batch.row_R, batch.history_end_R),
        )
        index = InteractionIndex.build(histories, self.interaction_fields) if self.settings.interactions else None
        return self.candidates(context, tail, index, batch, histories.last_ts_R(batch.row_R, batch.history_end_R))

    # -- context ------------------------------------------------------------------------------------------------------

    def extend(
        self, old: Context | None, new_ND: Tensor, num_new_B: Tensor, first_B: Tensor, query_first_B: Tensor
    ) -> Context:
        """The context after `num_new_B` further full groups, `new_ND` flat, with the windows starting where told.

        Rows whose windows did not move keep their upper layers and add only the new groups' rows; rows whose windows moved
        recompute the query window against the kept first-layer keys and values.
        """
        if old is None:
            old = self._empty_context(new_ND, first_B, query_first_B)
        end_B = old.end_B + num_new_B
        row_N = torch.repeat_interleave(num_new_B)
        group_N = (
            old.end_B[row_N] + torch.arange(len(row_N), device=row_N.device) - (num_new_B.cumsum(0) - num_new_B)[row_N]
        )
        moved_B = (first_B != old.first_B) | (query_first_B != old.query_first_B)

        in_history = group_N >= first_B[row_N]
        key_NHZ, value_NHZ = self.layers[0].keys_values(new_ND, group_N)
        keep = (old.first_B, old.end_B, first_B, end_B, row_N[in_history], group_N[in_history])
        keys = [splice(old.keys[0], key_NHZ[in_history], *keep)]
        values = [splice(old.values[0], value_NHZ[in_history], *keep)]

        in_query = group_N >= query_first_B[row_N]
        keep = (old.query_first_B, old.end_B, query_first_B, end_B, row_N[in_query], group_N[in_query])
        tokens_BQD = splice(old.tokens_BQD, new_ND[in_query], *keep)

        computed_B = torch.where(moved_B, query_first_B, torch.maximum(old.end_B, query_first_B))
        row_P, group_P = ranges(computed_B, end_B)
        x_PD = tokens_BQD[row_P, group_P - query_first_B[row_P]]
        for layer, block in enumerate(self.layers):
            if layer > 0:
                key_PHZ, value_PHZ = block.keys_values(x_PD, group_P)
                keep = (old.query_first_B, computed_B, query_first_B, end_B, row_P, group_P)
                keys.append(splice(old.keys[layer], key_PHZ, *keep))
                values.append(splice(old.values[layer], value_PHZ, *keep))
            if layer < len(self.layers) - 1 and len(row_P):
                start_B = first_B if layer == 0 else query_first_B
                rows = row_P, group_P, computed_B, keys[layer], values[layer], start_B
                x_PD = block.run(self._group_rows, block, x_PD, *rows)
        return Context(first_B, query_first_B, end_B, tokens_BQD, keys, values)

    def _group_rows(
        self,
        block: Block,
        x_PD: Tensor,
        row_P: Tensor,
        group_P: Tensor,
        computed_B: Tensor,
        key_BGHZ: Tensor,
        value_BGHZ: Tensor,
        start_B: Tensor,
    ) -> Tensor:
        """One layer over the computed group rows, padded to [B, T] for attention only."""
        slot_P = group_P - computed_B[row_P]
        query_PHZ = block.queries(x_PD, group_P)
        if has_kernels(query_PHZ):
            readers = Readers.of_padded(row_offsets(row_P, len(start_B)), key_BGHZ.shape[1])
            context = key_BGHZ.flatten(0, 1), value_BGHZ.flatten(0, 1)
            return block.finish(x_PD, attend(query_PHZ, context, readers, group_P - start_B[row_P] + 1))
        longest = int(slot_P.max()) + 1
        query_BTHZ = query_PHZ.new_zeros(len(computed_B), longest, *query_PHZ.shape[1:])
        query_BTHZ[row_P, slot_P] = query_PHZ
        group_BT = computed_B[:, None] + torch.arange(longest, device=row_P.device)
        group_BG = start_B[:, None] + torch.arange(key_BGHZ.shape[1], device=row_P.device)
        # A row's own group is its newest key, so existing rows never read the padding behind the context.
        visible_BTG = visible(GROUP, group_BT[:, :, None], GROUP, group_BG[:, None, :])
        return block.finish(x_PD, attend_groups(query_BTHZ, key_BGHZ, value_BGHZ, visible_BTG)[row_P, slot_P])

    def _empty_context(self, like_ND: Tensor, first_B: Tensor, query_first_B: Tensor) -> Context:
        num_rows, block = len(first_B), self.layers[0]
        empty = like_ND.new_zeros(num_rows, 0, block.num_heads, like_ND.shape[-1] // block.num_heads)
        layers = [empty] * len(self.layers)
        return Context(
            first_B, query_first_B, first_B, like_ND.new_zeros(num_rows, 0, like_ND.shape[-1]), layers, layers
        )

    # -- a request's own tokens ---------------------------------------------------------------------------------------

    def tail(
        self,
        context: Context,
        row_R: Tensor,
        history_end_R: Tensor,
        user_key_R: Tensor,
        partial_RKd: Tensor,
        partial_exists_RK: Tensor,
    ) -> Tail:
        """Keys and values of each request's partial newest group and user globals. `row_R` is sorted."""
        partial_RD = self.embedding.groups(partial_RKd, partial_exists_RK)
        return self.tail_of_groups(context, row_R, history_end_R, user_key_R, partial_RD)

    def tail_of_groups(
        self, context: SharedContext, row_R: Tensor, history_end_R: Tensor, user_key_R: Tensor, partial_RD: Tensor
    ) -> Tail:
        """`tail` of partial groups that are tokens already; any where there is none."""
        x_RTD = self.tail_tokens(user_key_R, partial_RD)
        num_tail, num_rows = x_RTD.shape[1], len(context.first_of_layer_B(0))
        first = context.first_of_layer_B(0), context.first_of_layer_B(1)
        exists_RT, seen_PT, request_P, position_P, *visible = self.tail_reads(history_end_R, row_R, *first)
        x_PD = x_RTD.flatten(0, 1)
        turns = self.turns(position_P, x_PD.dtype)
        if has_kernels(x_PD):
            offsets_B1 = row_offsets(row_R, num_rows) * num_tail
            readers: Readers | None = None
        else:
            num_queries_B = (torch.bincount(row_R, minlength=num_rows) * num_tail).tolist()
        keys, values = [], []
        for layer, block in enumerate(self.layers[:-1]):
            query_PHZ, *pair_PHZ = block.project(x_PD, *turns[layer])
            key_RTHZ, value_RTHZ = (x.unflatten(0, exists_RT.shape) for x in pair_PHZ)
            keys.append(key_RTHZ)
            values.append(value_RTHZ)
            num_visible_P = visible[min(layer, 1)]
            if has_kernels(x_PD):
                groups = context.groups(layer, query_PHZ.dtype)
                reads = {"request_P": request_P, "sees_PT": seen_PT}
                readers = groups.over(readers) if readers else groups.readers(offsets_B1, **reads)
                attended_PD = attend(
                    query_PHZ,
                    groups.pair_NHZ,
                    readers,
                    num_visible_P,
                    (key_RTHZ, value_RTHZ),
                    scales_NH=groups.scales_NH,
                )
                x_PD = block.finish(x_PD, attended_PD)
            else:
                shared = context, layer, num_queries_B, num_visible_P
                x_PD = block.run(tail_layer, block, x_PD, query_PHZ, *shared, key_RTHZ, value_RTHZ, seen_PT)
        key_RTHZ, value_RTHZ = (
            x.unflatten(0, exists_RT.shape) for x in self.layers[-1].project_keys_values(x_PD, *turns[-1])
        )
        return Tail([*keys, key_RTHZ], [*values, value_RTHZ], exists_RT, x_PD.view_as(x_RTD))

    def tail_tokens(self, user_key_R: Tensor, partial_RD: Tensor) -> Tensor:
        """[R, T, D]: inputs of the first layer."""
        globals_RMD = self.embedding.user_globals(user_key_R)
        return torch.cat([partial_RD[:, None], globals_RMD.to(partial_RD.dtype)], dim=1)

    @fused_on_cuda
    def tail_reads(
        self, history_end_R: Tensor, row_R: Tensor, first_B: Tensor, query_first_B: Tensor
    ) -> tuple[Tensor, ...]:
        """What exists of tails, what its P = R * T tokens see of it, their requests, positions, and groups seen by layer."""
        windows, kind_T = self.windows, self.tail_kinds(row_R.device)
        full_R = history_end_R // windows.merge_size
        has_partial_R = full_R * windows.merge_size < history_end_R
        exists_RT = has_partial_R[:, None] | (kind_T == GLOBAL)
        position_RT = torch.where(kind_T == GROUP, full_R[:, None], windows.num_groups(history_end_R)[:, None])
        request_R = torch.arange(len(row_R), device=row_R.device)
        of_requests = request_R, *(full_R - of_B[row_R] for of_B in (first_B, query_first_B))
        # contiguous, as kernels read them: of one request alone, `flatten` would be a view of one number
        request_P, *visible = (x_R[:, None].expand_as(exists_RT).contiguous().flatten() for x_R in of_requests)
        return (
            exists_RT,
            self.tail_tokens_see(exists_RT).flatten(0, 1),
            request_P,
            position_RT.flatten(),
            *visible,
        )

    def candidates(
        self,
        context: SharedContext,
        tail: Tail,
        index: CandidateIndex | None,
        batch: RequestTensors,
        last_event_ts_R: Tensor,
    ) -> Tensor:
        """[C, tasks]: each candidate against context, its request's tail and itself, never another candidate."""
        first = context.first_of_layer_B(0), context.first_of_layer_B(1)
        request_C, row_C, position_C, sees_tail_CT, offsets_B1, *visible = self._candidate_reads(
            batch.history_end_R, batch.row_R, batch.candidate_offsets_R1, batch.num_candidates, tail.exists_RT, *first
        )
        request_RD = self.embedding.requests(batch.request_ts_R, last_event_ts_R)
        features_CF = None if index is None else self.interactions(index, batch, row_C, request_C, request_RD.dtype)
        x_CD = self.enter(request_RD, request_C, features_CF, batch.candidates)
        turns = self.turns(position_C, x_CD.dtype)
        num_rows = len(first[0])
        if has_kernels(x_CD):
            reads = {
                "request_P": request_C,
                "sees_PT": sees_tail_CT,
                "request_offsets_JR1": batch.candidate_offsets_R1[None],
            }
            readers: Readers | None = None
        else:
            num_queries_B = torch.bincount(row_C, minlength=num_rows).tolist()
            sees_CS = torch.cat([sees_tail_CT, sees_tail_CT.new_ones(len(row_C), 1)], dim=1)
        for layer, block in enumerate(self.layers):
            num_visible_C = visible[min(layer, 1)]
            if has_kernels(x_CD):
                query_CHZ, key_CHZ, value_CHZ = block.project(x_CD, *turns[layer])
                groups = context.groups(layer, query_CHZ.dtype)
                readers = groups.over(readers) if readers else groups.readers(offsets_B1, **reads)
                attended_CD = attend(
                    query_CHZ,
                    groups.pair_NHZ,
                    readers,
                    num_visible_C,
                    (tail.keys[layer], tail.values[layer]),
                    (key_CHZ, value_CHZ),
                    groups.scales_NH,
                )
                x_CD = block.finish(x_CD, attended_CD)
            else:
                shared = context, layer, num_queries_B, num_visible_C
                x_CD = block.run(candidate_layer, block, x_CD, turns[layer], *shared, tail, request_C, sees_CS)
        return self.leave(x_CD, features_CF, batch.candidates["item_id"])

    @fused_on_cuda
    def _candidate_reads(
        self,
        history_end_R: Tensor,
        row_R: Tensor,
        offsets_R1: Tensor,
        num_candidates: int,
        exists_RT: Tensor,
        first_B: Tensor,
        query_first_B: Tensor,
    ) -> tuple[Tensor, ...]:
        """Candidates' requests, histories, positions, seen tail tokens, where each history's begin, and groups seen by layer."""
        place_C = torch.arange(num_candidates, device=row_R.device)
        request_C = torch.searchsorted(offsets_R1, place_C, right=True) - 1  # not in a slice: see `grow.Spans`
        row_C, full_C = row_R[request_C], (history_end_R // self.windows.merge_size)[request_C]
        visible = [full_C - of_B[row_C] for of_B in (first_B, query_first_B)]
        position_C = self.windows.num_groups(history_end_R)[request_C]
        sees_CT, offsets_B1 = (
            self.candidates_see_tail(exists_RT)[request_C],
            offsets_R1[row_offsets(row_R, len(first_B))],
        )
        return request_C, row_C, position_C, sees_CT, offsets_B1, *visible

    def candidates_see_tail(self, exists_RT: Tensor) -> Tensor:
        """[R, T]: the tail tokens that a request's candidates see."""
        kind_T, index_1 = self.tail_kinds(exists_RT.device), exists_RT.new_zeros(1, dtype=torch.int64)
        return visible(CANDIDATE, index_1, kind_T, index_1) & exists_RT

    def tail_tokens_see(self, exists_RT: Tensor) -> Tensor:
        """[R, T, T]: which of its tail's tokens each tail token sees; an absent one sees itself, so that it sees something."""
        kind_T = self.tail_kinds(exists_RT.device)
        seen_TT = visible(kind_T[:, None], kind_T.new_zeros(1), kind_T, kind_T.new_zeros(1))
        return seen_TT & exists_RT[:, None] | torch.eye(len(kind_T), dtype=torch.bool, device=exists_RT.device)

    def tail_kinds(self, device: torch.device) -> Tensor:
        """[T]: a tail is the partial newest group, then the user globals."""
        place_T = torch.arange(1 + self.embedding.num_globals, device=device)
        return torch.where(place_T == 0, GROUP, GLOBAL)

    # -- events to groups ---------------------------------------------------------------------------------------------

    def full_groups(self, events: EventTensors, x_Ed: Tensor) -> Tensor:
        """[N, D]: every full group of every history, flat. Histories start on a group."""
        first_B = events.offsets_B1[:-1]
        row_N, group_N = ranges(torch.zeros_like(first_B), events.num_events_B // self.windows.merge_size)
        start_N = first_B[row_N] + group_N * self.windows.merge_size
        slots_K = torch.arange(self.windows.merge_size, device=start_N.device)
        events_NK = start_N[:, None] + slots_K
        return self.embedding.groups(take_rows(x_Ed, events_NK))

    def partial_groups(
        self, events: EventTensors, x_Ed: Tensor, row_R: Tensor, history_end_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[R, K, d] and which exist, [R, K]: the events of each request's partial newest group, none if its last is full."""
        slots_K = torch.arange(self.windows.merge_size, device=row_R.device)
        start_R = history_end_R // self.windows.merge_size * self.windows.merge_size
        exists_RK = start_R[:, None] + slots_K < history_end_R[:, None]
        position_RK = (start_R - events.first_index_B[row_R] + events.offsets_B1[row_R])[:, None] + slots_K
        if not len(x_Ed):  # the empty sum keeps every weight in the graph, which data-parallel training counts on
            return x_Ed.sum() * 0 + x_Ed.new_zeros(*exists_RK.shape, x_Ed.shape[-1]), exists_RK
        return x_Ed[torch.where(exists_RK, position_RK, 0)] * exists_RK[..., None], exists_RK
