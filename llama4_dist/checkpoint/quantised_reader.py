"""Reads a quantised linear, or a cut of it, from its shards, and refuses scales that no quantiser writes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llama4_dist.checkpoint.fault import fault, shown
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.quantised import QuantisedLinear
from llama4_dist.checkpoint.quantised_tensors import QuantisedEntry
from llama4_dist.checkpoint.scheme import Scheme
from llama4_dist.checkpoint.shard import EVERYTHING, Shard


def read_quantised(
    shards: Mapping[str, Shard],
    entry: QuantisedEntry,
    scheme: Scheme,
    *,
    rows: slice = EVERYTHING,
    columns: slice = EVERYTHING,
) -> QuantisedLinear:
    """Return outputs `rows` and inputs `columns` of a linear as views, but for scales that were cut.

    Raise CheckpointError for a scale that is not a positive finite number, ValueError for columns that cut a group.
    """
    first, last, _ = columns.indices(entry.shape[1])
    _check_cut(first, last, entry.shape[1], scheme)
    if entry.stated_shape is not None:
        _check_stated_shape(shards, entry.stated_shape, entry.shape)
    if scheme.is_packed:
        bits = scheme.number.bits
        end = None if last == entry.shape[1] else last * bits // 8  # the last bytes may be padding
        stored = shards[entry.stored.file].bytes_of(entry.stored, rows=rows, columns=slice(first * bits // 8, end))
    else:
        stored = shards[entry.stored.file].matrix(entry.stored, rows=rows, columns=slice(first, last))
    scales_FG = read_scales(shards, entry)[rows]
    if scheme.group_size is not None:
        scales_FG = scales_FG[:, first // scheme.group_size : last // scheme.group_size]
    return QuantisedLinear(scheme=scheme, width=last - first, stored=stored, scales_FG=scales_FG)


def read_scales(shards: Mapping[str, Shard], entry: QuantisedEntry) -> Tensor:
    """Return all scales of a linear [F, G], checked."""
    scales = shards[entry.scale.file].matrix(entry.scale)
    wrong = ~(scales.isfinite() & (scales > 0))
    if wrong.any():
        at = [int(index) for index in wrong.nonzero()[0]]
        value = float(scales[tuple(at)])
        cause = f"holds the scale {value:g} at {at}; scales are positive and finite: download the file again"
        raise fault(entry.scale.file, cause, tensor=entry.scale.name)
    return scales.view(entry.shape[0], -1)


def _check_cut(first: int, last: int, width: int, scheme: Scheme) -> None:
    unit = scheme.group_size or (2 if scheme.number.bits == 4 else 1)
    if first % unit or (last % unit and last != width):
        raise ValueError(f"inputs [{first}, {last}) cut a group: give multiples of {unit}, or the end, {width}")


def _check_stated_shape(shards: Mapping[str, Shard], entry: TensorEntry, shape: tuple[int, int]) -> None:
    stated = shards[entry.file].matrix(entry).to(torch.int64).tolist()
    if stated != list(shape):
        raise fault(entry.file, f"says {shown(stated)}; {list(shape)} is expected", tensor=entry.name)
