"""What all layers of a step share, in the form the native passes read: rotation, slots, blocks of queries.

What the layers of a kind have in common is made once, and for each group of layers only the places of its keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from llama4_dist.config import ModelConfig
from llama4_dist.model.batch import PageRun, SequenceSpan
from llama4_dist.model.kv_layout import KVLayout
from llama4_dist.model.rope import query_temperature, rotation_table
from llama4_dist.native.bindings import QUERY_BLOCK_FIELDS, AttentionStep

Indices = NDArray[np.int64]

QUERY_ROWS = 48  # queries of a block times the heads that share a key head: what reads keys from a near cache together
_ADDRESS = 4  # the field of a query block that says where the pages are


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CpuPlan:
    """A step's attention for each group of layers; `kept` is what the native structures point to."""

    num_tokens: int
    groups: tuple[AttentionStep, ...]
    kept: tuple[object, ...]


def plan_step(
    spans: Sequence[SequenceSpan],
    *,
    config: ModelConfig,
    frequencies_C: Tensor,
    layout: KVLayout,
    block_size: int,
) -> CpuPlan:
    """Return the plan of a step."""
    firsts = np.array([span.num_cached for span in spans], dtype=np.int64)
    counts = np.array([span.num_tokens for span in spans], dtype=np.int64)
    sequences = np.repeat(np.arange(len(spans)), counts)
    rows = np.cumsum(counts) - counts
    positions = np.arange(len(sequences)) - rows[sequences] + firsts[sequences]
    rotation_T1C = rotation_table(from_numpy(positions), frequencies_C)
    temperature_T = query_temperature(from_numpy(positions), config.floor_scale, config.attn_scale)
    kept: list[object] = [rotation_T1C, temperature_T]
    queries = max(1, QUERY_ROWS // (config.num_heads // config.num_kv_heads))
    blocks = {
        chunk_size: query_blocks(firsts, counts, chunk_size=chunk_size, at_most=queries, block_size=block_size)
        for chunk_size in {group.chunk_size for group in layout.groups}
    }
    groups = []
    for number, group in enumerate(layout.groups):
        runs = [span.pages[number] for span in spans]
        addresses = np.array([run.address for run in runs], dtype=np.int64)
        of_block, shared_blocks = blocks[group.chunk_size]
        own_blocks = shared_blocks.copy()
        own_blocks[:, _ADDRESS] = addresses[of_block]
        slots = slots_of(runs, sequences, positions, block_size)
        kept += [runs, own_blocks, slots]
        groups.append(
            AttentionStep(
                len(positions),
                rotation_T1C.data_ptr(),
                temperature_T.data_ptr(),
                address_of(slots),
                len(own_blocks),
                address_of(own_blocks),
            )
        )
    return CpuPlan(num_tokens=len(positions), groups=tuple(groups), kept=tuple(kept))


def query_blocks(
    firsts: Indices, counts: Indices, *, chunk_size: int | None, at_most: int, block_size: int
) -> tuple[Indices, Indices]:
    """Cut each sequence's new positions at the edges of chunks, and into `at_most` queries.

    Returns the sequence of each block, and the blocks as `l4d::QueryBlock` but for the address of the pages.
    """
    if counts.max(initial=0) <= 1:  # decode: one query each
        sequences, starts, lengths = np.arange(len(counts)), firsts, counts
    else:
        parts = [
            (sequence, start, stop - start)
            for sequence, (first, count) in enumerate(zip(firsts.tolist(), counts.tolist(), strict=True))
            for start, stop in _cut(first, first + count, chunk_size, at_most)
        ]
        sequences, starts, lengths = np.array(parts, dtype=np.int64).T
    first_keys = np.zeros_like(starts) if chunk_size is None else starts // chunk_size * chunk_size
    blocks = np.empty((len(starts), QUERY_BLOCK_FIELDS), dtype=np.int64)
    blocks[:, 0] = np.cumsum(lengths) - lengths
    blocks[:, 1] = lengths
    blocks[:, 2] = first_keys
    blocks[:, 3] = starts - first_keys + 1
    blocks[:, 5] = block_size
    return sequences, blocks


def slots_of(runs: Sequence[PageRun], sequences: Indices, positions: Indices, block_size: int) -> Indices:
    """Return the cache slot of each position of its sequence in one group."""
    blocks, offsets = np.divmod(positions, block_size)
    if len(sequences) == len(runs):  # decode: a token a sequence
        places = zip(runs, blocks.tolist(), strict=True)
        pages = np.array([run.ids[block - run.first_block] for run, block in places], dtype=np.int64)
    else:
        pages = np.empty_like(positions)
        for sequence, run in enumerate(runs):
            own = slice(*np.searchsorted(sequences, (sequence, sequence + 1)))
            pages[own] = run.ids_N[blocks[own] - run.first_block]
    return pages * block_size + offsets


def address_of(array: Indices) -> int:
    """Return where an array lies; `ndarray.ctypes` takes longer."""
    address: int = array.__array_interface__["data"][0]
    return address


def _cut(first: int, end: int, chunk_size: int | None, at_most: int) -> list[tuple[int, int]]:
    parts = []
    while first < end:
        stop = min(end, first + at_most)
        if chunk_size is not None:
            stop = min(stop, (first // chunk_size + 1) * chunk_size)
        parts.append((first, stop))
        first = stop
    return parts
