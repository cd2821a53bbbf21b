"""Turns a batch into the integer tables that all kernels of a step read, in one block of memory and one copy.

It decides which queries share a tile and cuts them at chunk edges; it knows no weights and no values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama4_dist.gpu.attention import ITEM_FIELDS, KEYS_PER_SPLIT, AttentionWork
from llama4_dist.model.batch import SequenceSpan

Item = tuple[int, int, int, int, int]  # see attention.AttentionWork


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTables:
    """Tables of a step on the device, int32. Rows past the batch's tokens are padding: their sequence is -1.

    `page_tables` is [groups, B, pages], `first_pages` [groups, B]. Attention work comes apart for single queries
    (`decode`) and for tiles of several (`prefill`), each for layers that see all and for layers that see their chunk.
    """

    memory: Tensor  # holds all of them
    tokens_T: Tensor
    positions_T: Tensor
    sequences_T: Tensor
    page_tables: Tensor
    first_pages: Tensor
    decode_full: AttentionWork
    decode_chunked: AttentionWork
    prefill_full: AttentionWork
    prefill_chunked: AttentionWork


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Sizes that a table is padded to, so that steps of like size have tables of one layout."""

    num_rows: int
    num_sequences: int
    num_pages: int
    max_splits: int


def extent_of(spans: Sequence[SequenceSpan], num_rows: int) -> Extent:
    """Return the sizes for these spans, pages and splits rounded up to powers of two."""
    num_pages = max(len(run.ids) for span in spans for run in span.pages)
    num_keys = max(span.num_cached + span.num_tokens for span in spans)
    return Extent(
        num_rows=num_rows,
        num_sequences=num_rows if is_decode(spans) else len(spans),
        num_pages=_power_of_two(num_pages),
        max_splits=_power_of_two(-(-num_keys // KEYS_PER_SPLIT)),
    )


def is_decode(spans: Sequence[SequenceSpan]) -> bool:
    """Whether every span is one token: then tables are padded to the rows, so that a recorded step fits again."""
    return all(span.num_tokens == 1 for span in spans)


class TableWriter:
    """Fills the tables of steps of one extent; `write` reuses host and device memory, so one step at a time."""

    def __init__(self, extent: Extent, *, chunk_size: int | None, per_tile: int, device: torch.device) -> None:
        self.extent = extent
        self._chunk_size = chunk_size
        self._per_tile = per_tile
        self._device = device

    def host_tables(self, token_ids: Sequence[int], spans: Sequence[SequenceSpan]) -> dict[str, NDArray[np.int32]]:
        """Return the tables by name, in the order in which they lie in memory."""
        extent = self.extent
        full, chunked = (list(_items(spans, chunk, self._per_tile)) for chunk in (None, self._chunk_size))
        positions = [p for s in spans for p in range(s.num_cached, s.num_cached + s.num_tokens)]
        sequences = [index for index, span in enumerate(spans) for _ in range(span.num_tokens)]
        pages = np.zeros((len(spans[0].pages), extent.num_sequences, extent.num_pages), dtype=np.int32)
        first_pages = np.zeros(pages.shape[:2], dtype=np.int32)
        for sequence, span in enumerate(spans):
            for group, run in enumerate(span.pages):
                pages[group, sequence, : len(run.ids)] = run.ids_N
                first_pages[group, sequence] = run.first_block
        return {
            "tokens_T": _padded(token_ids, extent.num_rows, 0),
            "positions_T": _padded(positions, extent.num_rows, 0),
            "sequences_T": _padded(sequences, extent.num_rows, -1),
            "decode_full": self._work([item for item in full if item[2] == 1], spans),
            "decode_chunked": self._work([item for item in chunked if item[2] == 1], spans),
            "prefill_full": _rows([item for item in full if item[2] > 1]),
            "prefill_chunked": _rows([item for item in chunked if item[2] > 1]),
            "first_pages": first_pages,
            "page_tables": pages,
        }

    def write(self, token_ids: Sequence[int], spans: Sequence[SequenceSpan], into: Tensor | None = None) -> StepTables:
        """Copy the tables of a step to the device, into the int32 memory `into` if given."""
        tables = self.host_tables(token_ids, spans)
        flat = torch.from_numpy(np.concatenate([table.ravel() for table in tables.values()]))
        if into is None:
            into = flat.to(self._device)
        else:
            into.copy_(flat)
        return self.views(into, {name: table.shape for name, table in tables.items()})

    def views(self, memory: Tensor, shapes: dict[str, tuple[int, ...]]) -> StepTables:
        """Return the tables that lie in `memory`."""
        max_splits = self.extent.max_splits
        in_chunk = max_splits if self._chunk_size is None else min(max_splits, -(-self._chunk_size // KEYS_PER_SPLIT))
        parts = memory.split([int(np.prod(shape)) for shape in shapes.values()])
        tables = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        works = {
            name: AttentionWork(items=tables[name], max_splits=in_chunk if "chunked" in name else max_splits)
            for name in ("decode_full", "decode_chunked", "prefill_full", "prefill_chunked")
        }
        return StepTables(
            memory=memory,
            tokens_T=tables["tokens_T"],
            positions_T=tables["positions_T"],
            sequences_T=tables["sequences_T"],
            page_tables=tables["page_tables"],
            first_pages=tables["first_pages"],
            **works,
        )

    def _work(self, items: Sequence[Item], spans: Sequence[SequenceSpan]) -> NDArray[np.int32]:
        return _rows(items, self.extent.num_rows if is_decode(spans) else len(items))


def _items(spans: Sequence[SequenceSpan], chunk_size: int | None, per_tile: int) -> Iterator[Item]:
    """Cut spans into tiles of consecutive queries that have their first key in common."""
    row = 0
    for sequence, span in enumerate(spans):
        position, end = span.num_cached, span.num_cached + span.num_tokens
        while position < end:
            first_key = 0 if chunk_size is None else position // chunk_size * chunk_size
            stop = min(end, position + per_tile)
            if chunk_size is not None:
                stop = min(stop, first_key + chunk_size)
            yield row, position, stop - position, first_key, sequence
            row += stop - position
            position = stop


def _rows(items: Sequence[Item], num_rows: int | None = None) -> NDArray[np.int32]:
    table = np.zeros((len(items) if num_rows is None else num_rows, ITEM_FIELDS), dtype=np.int32)
    if items:
        table[: len(items)] = items
    return table


def _padded(values: Sequence[int], length: int, filler: int) -> NDArray[np.int32]:
    table = np.full(length, filler, dtype=np.int32)
    table[: len(values)] = values
    return table


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
