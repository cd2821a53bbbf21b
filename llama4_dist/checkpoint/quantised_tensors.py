"""Finds the stored tensors of quantised linears and holds their dtypes and shapes against the scheme; reads no weight.

A linear is quantised where it has a scale. Scales are [F], [F, 1] or [F, G], in any float of the format.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llama4_dist.checkpoint.fault import fault
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.scheme import KEY, Number, Scheme

# In the names of attention and feed-forward networks, never of a router, a norm, an embedding or the head. In a part
# the columns that it holds stand behind.
QUANTISABLE = "_proj.weight"
SCALE_DTYPES = ("F32", "BF16", "F16")
_STORED = {Number.FLOAT8: "F8_E4M3", Number.INT8: "I8", Number.INT4: "I32"}
SCALE, PACKED, STATED = "_scale", "_packed", "_shape"  # behind the name of a weight


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedEntry:
    """Where the tensors of one quantised linear [F, D] lie."""

    shape: tuple[int, int]
    stored: TensorEntry
    scale: TensorEntry
    stated_shape: TensorEntry | None  # of a packed one: two integers

    def tensors(self) -> Iterator[TensorEntry]:
        yield self.stored
        yield self.scale
        if self.stated_shape is not None:
            yield self.stated_shape


def find_quantised(
    name: str, shape: tuple[int, ...], scheme: Scheme | None, entries: Mapping[str, TensorEntry]
) -> QuantisedEntry | None:
    """Return the linear `name` (as stored, with `.weight`) if it is quantised, None if not.

    Raise CheckpointError naming the tensor that is missing or does not fit the scheme.
    """
    marked = next((entries[name + mark] for mark in (SCALE, PACKED) if name + mark in entries), None)
    if marked is None and name in entries and entries[name].dtype in _STORED.values():
        marked = entries[name]  # quantised, and its scale is missing
    if marked is None or QUANTISABLE not in name:
        return None
    if scheme is None:
        raise fault(marked.file, f"belongs to a quantised linear, but config.json has no {KEY}", tensor=marked.name)
    num_outputs, width = shape
    words = -(-width * scheme.number.bits // 32)
    stored_name = name + PACKED if scheme.is_packed else name
    stored = _entry(entries, stored_name, marked)
    scale = _entry(entries, name + SCALE, marked)
    if scheme.is_packed:
        _check(stored, (num_outputs, words), "I32")
    else:
        _check(stored, (num_outputs, width), _STORED[scheme.number])
    _check_scale(scale, num_outputs, width, scheme)
    stated = _entry(entries, name + STATED, marked) if scheme.is_packed else None
    if stated is not None and (stated.dtype not in ("I64", "I32") or stated.shape != (2,)):
        cause = f"is {stated.dtype} {list(stated.shape)}; two integers, I64 or I32, are expected"
        raise fault(stated.file, cause, tensor=stated.name)
    return QuantisedEntry(shape=(num_outputs, width), stored=stored, scale=scale, stated_shape=stated)


def _entry(entries: Mapping[str, TensorEntry], name: str, beside: TensorEntry) -> TensorEntry:
    if name not in entries:
        raise fault(beside.file, f"is missing beside {beside.name}: download the checkpoint again", tensor=name)
    return entries[name]


def _check(entry: TensorEntry, shape: tuple[int, ...], dtype: str) -> None:
    if entry.shape != shape:
        raise fault(entry.file, f"has shape {list(entry.shape)}; {list(shape)} is expected", tensor=entry.name)
    if entry.dtype != dtype:
        raise fault(entry.file, f"is {entry.dtype}; {KEY} calls for {dtype}", tensor=entry.name)


def _check_scale(entry: TensorEntry, num_outputs: int, width: int, scheme: Scheme) -> None:
    try:
        num_groups = scheme.num_groups(width)
    except ValueError as error:
        cause = f"cannot be right: {error}; {KEY}.group_size does not fit this model"
        raise fault(entry.file, cause, tensor=entry.name) from None
    shapes = [(num_outputs, num_groups)] + [(num_outputs,)] * (num_groups == 1)
    if entry.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise fault(entry.file, f"has shape {list(entry.shape)}; {expected} is expected", tensor=entry.name)
    if entry.dtype not in SCALE_DTYPES:
        raise fault(entry.file, f"is {entry.dtype}; a scale is one of {', '.join(SCALE_DTYPES)}", tensor=entry.name)
