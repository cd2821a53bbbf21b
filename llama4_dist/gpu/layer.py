"""One decoder layer on the device: the order of the launches, and no arithmetic of its own."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from llama4_dist.config import ModelConfig
from llama4_dist.gpu.attention import AttentionWork, PagedKeys, attend
from llama4_dist.gpu.packed import Packed
from llama4_dist.gpu.routing import SortedRows, group_rows, sort_rows
from llama4_dist.gpu.row_kernels import add_and_norm, add_norm_and_route, rotate_and_store
from llama4_dist.gpu.step_tables import StepTables
from llama4_dist.gpu.stream_linear import MAX_ROWS, RowGroups
from llama4_dist.gpu.weights import LayerWeights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepInputs:
    """What all layers of a step read: tables, and per row cosines and sines [T, 2, C/2] and the query temperature."""

    tables: StepTables
    rotation_T2C: Tensor
    temperature_T: Tensor
    all_rows: RowGroups | SortedRows  # every row through one linear


def every_row(num_rows: int, device: torch.device) -> RowGroups | SortedRows:
    """Return the rows of a dense linear, in the form for few or for many of them."""
    if num_rows <= MAX_ROWS:
        return _few_rows(num_rows, device)
    return SortedRows(order_R=None, starts=RowGroups.dense(num_rows, device).starts)


@cache  # at most one a model
def _few_rows_apart(num_rows: int, device: torch.device) -> RowGroups:
    starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
    return RowGroups(num_groups=num_rows, max_rows=1, starts=starts, experts=starts, order_R=None)


@cache  # at most MAX_ROWS entries, which recorded steps point to
def _few_rows(num_rows: int, device: torch.device) -> RowGroups:
    return RowGroups.dense(num_rows, device)


class GpuLayer:
    """x += attention(norm(x)); x += feed_forward(norm(x)), where each sum is made by the norm that follows it."""

    def __init__(self, config: ModelConfig, layer: int, weights: LayerWeights) -> None:
        self.weights = weights
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.has_rope = config.rope_layers[layer]
        self.has_qk_norm = config.use_qk_norm and self.has_rope
        self.has_temperature = config.temperature_tuning and not self.has_rope
        self.is_chunked = config.chunked_layers[layer]
        self.eps = config.rms_norm_eps
        self.num_routed = config.experts_per_token if config.moe_layers[layer] else 0  # copies of a token

    def __call__(
        self, x_TD: Tensor, added_ND: Tensor | None, num_routed: int, step: StepInputs, pages: PagedKeys
    ) -> Tensor:
        """Add the last layer's outputs to `x_TD` in place and return this layer's, not yet added.

        `num_routed` says how those outputs lie, see `add_and_norm`.
        """
        attended_TD = self.attend(x_TD, added_ND, num_routed, step, pages)
        if self.weights.router_ED is None:
            return self.dense_network(x_TD, attended_TD, step)
        copies_ND, experts_N = self.route(x_TD, attended_TD, step)
        if self.weights.shared is not None:
            return self._experts_apart(copies_ND, experts_N, self.weights.shared, step)
        return self._experts(copies_ND, self._rows_of(experts_N, x_TD.shape[0]))

    def _experts(self, copies_ND: Tensor, rows: RowGroups | SortedRows) -> Tensor:
        if isinstance(rows, SortedRows):
            assert rows.order_R is not None, "copies that were sorted have an order"
            copies_ND = copies_ND.index_select(0, rows.order_R)
        inner_NF = self.weights.gate_up.multiply(copies_ND, rows, gated=True)
        return self.weights.down.multiply(inner_NF, rows)

    def _experts_apart(
        self, copies_ND: Tensor, experts_N: Tensor, shared: tuple[Packed, Packed], step: StepInputs
    ) -> Tensor:
        """Return what `_experts` does where the shared expert's weights are of another format than the routed ones'."""
        num_tokens = len(copies_ND) // (self.num_routed + 1)
        num_copies = num_tokens * self.num_routed
        routed_ND = self._experts(copies_ND[:num_copies], self._rows_of(experts_N[:num_copies], num_tokens))
        gate_up, down = shared
        inner_TF = gate_up.multiply(copies_ND[num_copies:], step.all_rows, gated=True)
        return torch.cat([routed_ND, down.multiply(inner_TF, step.all_rows)])

    def attend(
        self, x_TD: Tensor, added_ND: Tensor | None, num_routed: int, step: StepInputs, pages: PagedKeys
    ) -> Tensor:
        """Add the last layer's outputs to `x_TD` in place and return attention's, not yet added: [T, D]."""
        normed_TD = torch.empty_like(x_TD)
        add_and_norm(x_TD, added_ND, self.weights.input_norm_D, normed_TD, eps=self.eps, num_routed=num_routed)
        return self._attention(normed_TD, step, pages)

    def dense_network(self, x_TD: Tensor, attended_TD: Tensor, step: StepInputs) -> Tensor:
        """Add attention's outputs to `x_TD` in place and return those of a layer's one network, not yet added."""
        normed_TD = torch.empty_like(x_TD)
        add_and_norm(x_TD, attended_TD, self.weights.post_attention_norm_D, normed_TD, eps=self.eps)
        return self.network(normed_TD, step)

    def network(self, normed_TD: Tensor, step: StepInputs) -> Tensor:
        """Return every row's outputs of the one network that `weights` has: a dense layer's, or the shared expert."""
        inner_TF = self.weights.gate_up.multiply(normed_TD, step.all_rows, gated=True)
        return self.weights.down.multiply(inner_TF, step.all_rows)

    def route(self, x_TD: Tensor, attended_TD: Tensor, step: StepInputs) -> tuple[Tensor, Tensor]:
        """Add attention's outputs to `x_TD` in place; return what the experts read, and which expert reads which row.

        copies_ND [T·K + T, D] holds a token's K scored copies side by side, then each token for the shared expert;
        experts_N are int32, the shared expert's number the last.
        """
        router_ED = self.weights.router_ED
        assert router_ED is not None, "a dense layer chooses nothing"
        num_tokens, width = x_TD.shape
        copies_ND = x_TD.new_empty((num_tokens * (self.num_routed + 1), width))
        experts_N = torch.empty(len(copies_ND), dtype=torch.int32, device=copies_ND.device)
        add_norm_and_route(
            x_TD,
            attended_TD,
            self.weights.post_attention_norm_D,
            copies_ND[num_tokens * self.num_routed :],
            router_ED,
            step.tables.sequences_T,
            eps=self.eps,
            experts_per_token=self.num_routed,
            experts_N=experts_N,
            copies_ND=copies_ND,
        )
        return copies_ND, experts_N

    def _attention(self, x_TD: Tensor, step: StepInputs, pages: PagedKeys) -> Tensor:
        tables = step.tables
        q_THC = x_TD.new_empty((x_TD.shape[0], self.num_heads, self.head_dim))
        rotate_and_store(
            self.weights.qkv.multiply(x_TD, step.all_rows),
            q_THC,
            pages,
            positions_T=tables.positions_T,
            sequences_T=tables.sequences_T,
            rotation_T2C=step.rotation_T2C if self.has_rope else None,
            temperature_T=step.temperature_T if self.has_temperature else None,
            has_qk_norm=self.has_qk_norm,
            eps=self.eps,
        )
        attended_THC = torch.empty_like(q_THC)
        for work, in_splits in self._work(tables):
            attend(q_THC, pages, work, attended_THC, in_splits=in_splits)
        return self.weights.o.multiply(attended_THC.flatten(1), step.all_rows)

    def _work(self, tables: StepTables) -> tuple[tuple[AttentionWork, bool], ...]:
        if self.is_chunked:
            return (tables.decode_chunked, True), (tables.prefill_chunked, False)
        return (tables.decode_full, True), (tables.prefill_full, False)

    def _rows_of(self, experts_N: Tensor, num_tokens: int) -> RowGroups | SortedRows:
        """Return which copies go through which expert."""
        assert self.weights.router_ED is not None, "a dense layer has no copies"
        num_experts = self.weights.router_ED.shape[0]
        if num_tokens == 1:  # each copy is a group
            return replace(_few_rows_apart(len(experts_N), experts_N.device), experts=experts_N)
        if num_tokens > MAX_ROWS:
            return sort_rows(experts_N, num_experts + 1)
        max_groups = min(num_experts, num_tokens * self.num_routed) + 1
        return group_rows(experts_N, num_experts + 1, max_groups=max_groups, max_rows=num_tokens)
