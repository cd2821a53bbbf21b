"""Reads a quantised linear, or a cut of it, from its shards, and refuses scales that no quantiser writes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llama4_dist.checkpoint.blocks import matrix_block
from llama4_dist.checkpoint.fault import fault, shown
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.quantised import QuantisedLinear
from llama4_dist.checkpoint.quantised_blocks import Place, quantised_blocks
from llama4_dist.checkpoint.quantised_tensors import QuantisedEntry
from llama4_dist.checkpoint.scheme import Scheme
from llama4_dist.checkpoint.shard import Shard


def read_quantised(
    shards: Mapping[str, Shard],
    entry: QuantisedEntry,
    scheme: Scheme,
    *,
    rows: range | None = None,
    columns: range | None = None,
) -> QuantisedLinear:
    """Return outputs `rows` and inputs `columns` of a linear as views of what is stored.

    Raise CheckpointError for a scale that is not a positive finite number, ValueError for columns that cut a group.
    """
    blocks = quantised_blocks(entry, scheme, rows=rows, columns=columns)
    if entry.stated_shape is not None:
        _check_stated_shape(shards, entry.stated_shape, entry.shape)
    tensor, block = blocks.stored
    stored = shards[tensor.file].matrix(tensor, block)
    return QuantisedLinear(
        scheme=scheme, width=blocks.width, stored=stored, scales_FG=read_scales(shards, blocks.scales)
    )


def read_scales(shards: Mapping[str, Shard], place: Place) -> Tensor:
    """Return scales [F, G], checked."""
    entry, block = place
    scales_FG = shards[entry.file].matrix(entry, block)
    wrong = ~(scales_FG.isfinite() & (scales_FG > 0))
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        first_row, first_group = divmod(block.start, entry.shape[1])
        value, at = float(scales_FG[row, group]), [first_row + row, first_group + group]
        cause = f"holds the scale {value:g} at {at}; scales are positive and finite: download the file again"
        raise fault(entry.file, cause, tensor=entry.name)
    return scales_FG


def _check_stated_shape(shards: Mapping[str, Shard], entry: TensorEntry, shape: tuple[int, int]) -> None:
    stated = shards[entry.file].matrix(entry, matrix_block(entry.shape)).to(torch.int64).flatten().tolist()
    if stated != list(shape):
        raise fault(entry.file, f"says {shown(stated)}; {list(shape)} is expected", tensor=entry.name)
