"""The decoder without its routed experts, on a CUDA device: those are reached by a dispatcher, layer by layer.

The launches are those of `gpu.model`, single ones and not a recorded step: who gets a layer's rows is decided on the
host, which has to see the router's choice first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.config import ModelConfig
from llama4_dist.gpu.host_rows import HostRows
from llama4_dist.gpu.layer import GpuLayer, StepInputs
from llama4_dist.gpu.model import GpuLlama4, pages_of
from llama4_dist.gpu.weights import ModelWeights, load_weights
from llama4_dist.model.batch import Batch, SequenceSpan
from llama4_dist.model.dispatcher import Dispatcher
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.microbatches import run_layers, split_spans
from llama4_dist.stations import ATTENTION, COMBINE, EXPERT, OTHER, ROUTE, NotMeasured, Stations


@dataclass(slots=True, kw_only=True, eq=False)
class Part:
    """Some tokens of a step on their way through the layers.

    `outputs_ND` are the last layer's, not yet added to `x_TD`; `num_routed` says how they lie, see `add_and_norm`.
    """

    x_TD: Tensor
    step: StepInputs
    cache: KVCache
    dispatcher: Dispatcher
    stations: Stations
    microbatch: int
    host_rows: HostRows
    outputs_ND: Tensor | None = None
    num_routed: int = 0
    copies_ND: Tensor | None = None  # what the layer's experts read, the shared one's rows last
    in_flight: Any = None

    @property
    def num_copies(self) -> int:
        return len(self.x_TD) * self.num_routed


class SplitLayer:
    """A decoder layer in two halves, between which its routed rows are away."""

    def __init__(self, index: int, layer: GpuLayer) -> None:
        self._index = index
        self._layer = layer

    def begin(self, part: Part) -> None:
        """Run attention, then send rows to the experts, or run the dense network."""
        layer, x_TD, step = self._layer, part.x_TD, part.step
        pages = pages_of(part.cache, self._index, step.tables)
        attended_TD = layer.attend(x_TD, part.outputs_ND, part.num_routed, step, pages)
        part.num_routed = layer.num_routed
        part.stations.mark(ATTENTION)
        if not layer.num_routed:
            part.outputs_ND = layer.dense_network(x_TD, attended_TD, step)
            part.stations.mark(OTHER)
            return
        part.copies_ND, experts_N = layer.route(x_TD, attended_TD, step)
        routed = slice(0, part.num_copies)
        part.in_flight = part.host_rows.dispatch(
            self._index, part.copies_ND[routed], experts_N[routed], part.dispatcher, part.microbatch
        )
        part.stations.mark(ROUTE)

    def finish(self, part: Part) -> None:
        """Run the shared expert and take the routed ones' answers in."""
        if not self._layer.num_routed:
            return
        copies_ND, num_copies = part.copies_ND, part.num_copies
        assert copies_ND is not None, "nothing was sent"
        # What the experts have read is written over by what they say.
        copies_ND[num_copies:] = self._layer.network(copies_ND[num_copies:], part.step)
        part.stations.mark(EXPERT)
        part.host_rows.combine(part.in_flight, part.dispatcher, copies_ND[:num_copies])
        part.outputs_ND, part.copies_ND = copies_ND, None
        part.stations.mark(COMBINE)


class GpuDecoder:
    """`model.llama4.Llama4` by Triton's kernels; a token's bits are those of `GpuLlama4`, in any company."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self.stations: Stations = NotMeasured()  # the engine gives it its own
        self._model = GpuLlama4(config, weights, use_graphs=False)  # all that is before and after the layers
        self._layers = [SplitLayer(index, layer) for index, layer in enumerate(self._model.layers)]
        self._host_rows: list[HostRows] = []  # by microbatch

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        progress: Callable[[int, int], None] | None = None,
    ) -> "GpuDecoder":
        """Read all weights but the routed experts'; `progress` is told (layers read, layers in all)."""
        weights = load_weights(
            checkpoint, dtype=dtype, device=torch.device(device), with_routed=False, progress=progress
        )
        return cls(checkpoint.config, weights)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache, dispatcher: Dispatcher) -> Tensor:
        """Run one step and return the float32 logits [P, V] of `batch.logit_rows`."""
        dispatcher.begin_step(batch.step)
        token_ids = batch.token_ids_T.tolist()
        parts: list[Part] = []
        first = 0
        for spans in split_spans(batch.spans, batch.num_microbatches):
            stop = first + sum(span.num_tokens for span in spans)
            parts.append(self._part(spans, token_ids[first:stop], len(parts), cache, dispatcher))
            first = stop
        self.stations.mark(OTHER)
        run_layers(self._layers, parts)
        if not batch.logit_rows:
            return parts[0].x_TD.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        normed_TD = torch.cat([self._normed(part) for part in parts])
        return self._model.head(normed_TD[list(batch.logit_rows)])

    def _part(
        self,
        spans: Sequence[SequenceSpan],
        token_ids: Sequence[int],
        microbatch: int,
        cache: KVCache,
        dispatcher: Dispatcher,
    ) -> Part:
        while len(self._host_rows) <= microbatch:
            self._host_rows.append(HostRows(self._model.device))
        tables = self._model.writer(spans, len(token_ids)).write(token_ids, spans)
        return Part(
            x_TD=self._model.weights.embedding_VD.index_select(0, tables.tokens_T),
            step=self._model.inputs(tables),
            cache=cache,
            dispatcher=dispatcher,
            stations=self.stations,
            microbatch=microbatch,
            host_rows=self._host_rows[microbatch],
        )

    def _normed(self, part: Part) -> Tensor:
        assert part.outputs_ND is not None, "a model has layers"
        return self._model.normed(part.x_TD, part.outputs_ND, part.num_routed)
