"""Decode steps recorded once per size and replayed: a step is one launch, whatever the number of kernels in it.

Inside a graph nothing depends on the host: routing, page tables and lengths are read from device memory that is filled
before each replay. Sizes are rounded up to buckets; the rows that fill them are padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama4_dist.gpu.step_tables import Extent, TableWriter
from llama4_dist.gpu.stream_linear import MAX_ROWS
from llama4_dist.model.batch import SequenceSpan
from llama4_dist.model.kv_cache import KVCache

if TYPE_CHECKING:
    from llama4_dist.gpu.model import GpuLlama4

BUCKETS = tuple(1 << power for power in range(MAX_ROWS.bit_length()))
WARM_UPS = 2  # runs before recording: a kernel's first launch loads it, which a recording does not permit


def bucket_of(num_rows: int) -> int | None:
    """Return the rows of the graph that computes `num_rows`; None if there is none so large."""
    return next((bucket for bucket in BUCKETS if bucket >= num_rows), None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeGraph:
    """A recorded step, the memory its tables are written to, and the memory it leaves its logits in."""

    graph: torch.cuda.CUDAGraph
    writer: TableWriter
    tables_memory: Tensor
    logits_TV: Tensor


class DecodeGraphs:
    """Graphs by size, recorded when first needed; all share one pool of memory, for only one runs at a time."""

    def __init__(self, model: "GpuLlama4") -> None:
        self._model = model
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Extent, DecodeGraph] = {}
        self._cache: KVCache | None = None

    def run(self, token_ids: Sequence[int], spans: Sequence[SequenceSpan], cache: KVCache) -> Tensor:
        """Compute one token of each span; return float32 logits [T, V], of which the next run may reuse the memory."""
        if cache is not self._cache:  # a graph holds addresses
            self._graphs.clear()
            self._cache = cache
        bucket = bucket_of(len(spans))
        assert bucket is not None
        writer = self._model.writer(spans, bucket)
        graph = self._graphs.get(writer.extent)
        if graph is None:
            graph = self._graphs[writer.extent] = self._record(writer, token_ids, spans, cache)
        graph.writer.write(token_ids, spans, graph.tables_memory)
        graph.graph.replay()
        return graph.logits_TV[: len(spans)]

    def _record(
        self, writer: TableWriter, token_ids: Sequence[int], spans: Sequence[SequenceSpan], cache: KVCache
    ) -> DecodeGraph:
        tables = writer.write(token_ids, spans)
        # A step that runs twice stores the same keys and values twice, so warming up on the real one harms nothing.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._model.logits(*self._model.run_layers(tables, cache))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_TV = self._model.logits(*self._model.run_layers(tables, cache))
        return DecodeGraph(graph=graph, writer=writer, tables_memory=tables.memory, logits_TV=logits_TV)
