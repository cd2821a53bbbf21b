"""Llama 4 on one device with all its experts: a step of packed tokens in, logits out; decode steps as CUDA graphs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.config import ModelConfig
from llama4_dist.gpu.attention import PagedKeys, queries_per_tile
from llama4_dist.gpu.graphs import DecodeGraphs, bucket_of
from llama4_dist.gpu.layer import GpuLayer, StepInputs, every_row
from llama4_dist.gpu.row_kernels import add_and_norm
from llama4_dist.gpu.step_tables import StepTables, TableWriter, extent_of, is_decode
from llama4_dist.gpu.weights import ModelWeights, load_weights
from llama4_dist.model.batch import Batch, SequenceSpan
from llama4_dist.model.dispatcher import Dispatcher
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.rope import frequencies, query_temperature
from llama4_dist.stations import OTHER, NotMeasured, Stations


class GpuLlama4:
    """The decoder with its routed experts in this process; satisfies the engine's `ForwardModel`.

    A token's bits do not depend on the rows computed with it: every kernel computes a row alone, in an order of
    summation that depends on the geometry and the token's position only.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights, *, use_graphs: bool = True) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embedding_VD.device
        self.layers = [GpuLayer(config, layer, w) for layer, w in enumerate(weights.layers)]
        self.frequencies_C = frequencies(config.head_dim, config.rope_theta, config.rope_scaling).to(self.device)
        self.stations: Stations = NotMeasured()  # the engine gives it its own
        self._graphs = DecodeGraphs(self) if use_graphs and self.device.type == "cuda" else None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        expert_format: str = "stored",
        progress: Callable[[int, int], None] | None = None,
    ) -> "GpuLlama4":
        """Read all weights, routed experts too; `progress` is told (layers read, layers in all)."""
        weights = load_weights(
            checkpoint, dtype=dtype, device=torch.device(device), expert_format=expert_format, progress=progress
        )
        return cls(checkpoint.config, weights)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache, dispatcher: Dispatcher | None = None) -> Tensor:
        """Run one step and return the float32 logits [P, V] of `batch.logit_rows`. The dispatcher is not asked."""
        logits_PV = self._forward(batch, cache)
        self.stations.mark(OTHER)  # a step is one launch, or launches nobody waits for: the host sees no parts of it
        return logits_PV

    def _forward(self, batch: Batch, cache: KVCache) -> Tensor:
        token_ids = batch.token_ids_T.tolist()
        if self._graphs is not None and is_decode(batch.spans) and bucket_of(len(token_ids)) is not None:
            logits_TV = self._graphs.run(token_ids, batch.spans, cache)
            wants_all = batch.logit_rows == tuple(range(len(token_ids)))
            return logits_TV.clone() if wants_all else logits_TV[list(batch.logit_rows)]
        tables = self.writer(batch.spans, len(token_ids)).write(token_ids, batch.spans)
        x_TD, outputs_ND, num_routed = self.run_layers(tables, cache)
        if not batch.logit_rows:
            return x_TD.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        return self.logits(x_TD, outputs_ND, num_routed, batch.logit_rows)

    def writer(self, spans: Sequence[SequenceSpan], num_rows: int) -> TableWriter:
        """Return a writer of tables that hold these spans in `num_rows` rows."""
        return TableWriter(
            extent_of(spans, num_rows),
            chunk_size=self.config.chunk_size,
            per_tile=queries_per_tile(self.config.num_heads, self.config.num_kv_heads),
            device=self.device,
        )

    def run_layers(self, tables: StepTables, cache: KVCache) -> tuple[Tensor, Tensor, int]:
        """Return the residual stream, the last layer's outputs not yet added to it, and how those lie."""
        step = self.inputs(tables)
        x_TD = self.weights.embedding_VD.index_select(0, tables.tokens_T)
        outputs_ND, num_routed = None, 0
        for index, layer in enumerate(self.layers):
            outputs_ND = layer(x_TD, outputs_ND, num_routed, step, pages_of(cache, index, tables))
            num_routed = layer.num_routed
        assert outputs_ND is not None
        return x_TD, outputs_ND, num_routed

    def logits(
        self, x_TD: Tensor, outputs_ND: Tensor, num_routed: int, logit_rows: Sequence[int] | None = None
    ) -> Tensor:
        """Return float32 logits [P, V] of the rows, of all by default."""
        normed_TD = self.normed(x_TD, outputs_ND, num_routed)
        return self.head(normed_TD if logit_rows is None else normed_TD[list(logit_rows)])

    def normed(self, x_TD: Tensor, outputs_ND: Tensor, num_routed: int) -> Tensor:
        """Add the last layer's outputs to `x_TD` in place and return its norm, which the head reads."""
        normed_TD = torch.empty_like(x_TD)
        eps = self.config.rms_norm_eps
        add_and_norm(x_TD, outputs_ND, self.weights.norm_D, normed_TD, eps=eps, num_routed=num_routed)
        return normed_TD

    def head(self, normed_PD: Tensor) -> Tensor:
        """Return float32 logits [P, V]."""
        rows = every_row(len(normed_PD), self.device)
        return self.weights.head.multiply(normed_PD, rows, out_dtype=torch.float32)

    def inputs(self, tables: StepTables) -> StepInputs:
        """Return what all layers of a step read."""
        angles_TC = tables.positions_T.float()[:, None] * self.frequencies_C
        return StepInputs(
            tables=tables,
            rotation_T2C=torch.stack((angles_TC.cos(), angles_TC.sin()), dim=1),
            temperature_T=query_temperature(tables.positions_T, self.config.floor_scale, self.config.attn_scale),
            all_rows=every_row(tables.tokens_T.shape[0], self.device),
        )


def pages_of(cache: KVCache, layer: int, tables: StepTables) -> PagedKeys:
    """Return a layer's keys and values with the page table of its group."""
    keys_SD, values_SD = cache.slots(layer)
    group = cache.layout.group_of[layer]
    return PagedKeys(
        keys_SD=keys_SD,
        values_SD=values_SD,
        table=tables.page_tables[group],
        first_pages_B=tables.first_pages[group],
        page_size=cache.block_size,
    )
