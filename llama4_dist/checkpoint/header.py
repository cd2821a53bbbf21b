"""Reads and checks the header of a safetensors file before any of its tensors is touched.

Format: 8 bytes little-endian header length, a JSON object name → {dtype, shape, data_offsets}, then the tensors' bytes
(https://github.com/huggingface/safetensors#format). The check is stricter than the format where readers have differed:
tensors must cover the data section exactly, once, without holes, overlaps, empty tensors or bytes behind the last one.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from llama4_dist.checkpoint.directory import read_exactly
from llama4_dist.checkpoint.fault import fault, shown
from llama4_dist.checkpoint.strict_json import parse_object

MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 100_000
MAX_RANK = 8
PREFIX_BYTES = 8
ITEM_BYTES = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"], 1),
    **dict.fromkeys(["I16", "U16", "F16", "BF16"], 2),
    **dict.fromkeys(["I32", "U32", "F32"], 4),
    **dict.fromkeys(["I64", "U64", "F64"], 8),
}
_PICKLE_OR_ZIP = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies: bytes [start, stop) of the file, counted from the file's beginning."""

    name: str
    file: str
    dtype: str  # safetensors' name: F32, BF16, F16, ...
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def read_header(file: BinaryIO, name: str) -> dict[str, TensorEntry]:
    """Return the tensors of an open safetensors file by name; raise CheckpointError for anything irregular."""
    file_bytes = os.fstat(file.fileno()).st_size
    if file_bytes < PREFIX_BYTES:
        raise fault(name, f"has {file_bytes} bytes, too few for a safetensors file: download it again")
    prefix = read_exactly(file, PREFIX_BYTES, name)
    header_bytes = int.from_bytes(prefix, "little")
    if not 0 < header_bytes <= min(MAX_HEADER_BYTES, file_bytes - PREFIX_BYTES):
        if prefix.startswith(_PICKLE_OR_ZIP):
            raise fault(name, "is a pickled or zipped torch file: convert it to safetensors; pickles are never read")
        limit = min(MAX_HEADER_BYTES, file_bytes - PREFIX_BYTES)
        raise fault(name, f"states a header of {header_bytes} bytes; 1 to {limit} are possible")
    return parse_header(read_exactly(file, header_bytes, name), file_bytes=file_bytes, name=name)


def parse_header(raw: bytes, *, file_bytes: int, name: str) -> dict[str, TensorEntry]:
    """Return the tensors that the header `raw` of a file of `file_bytes` describes."""
    if not raw.startswith(b"{"):
        raise fault(name, "has a header that does not start with '{'")
    content = parse_object(raw, name)
    _check_metadata(content.pop("__metadata__", {}), name)
    if len(content) > MAX_TENSORS:
        raise fault(name, f"lists {len(content)} tensors; at most {MAX_TENSORS} are read")
    data_start = PREFIX_BYTES + len(raw)
    entries = {tensor: _entry(tensor, fields, data_start, name) for tensor, fields in content.items()}
    _check_cover(entries, data_start, file_bytes, name)
    return entries


def _check_metadata(metadata: Any, name: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fault(name, "has a __metadata__ that does not map strings to strings")


def _entry(tensor: str, fields: Any, data_start: int, name: str) -> TensorEntry:
    if not tensor or not tensor.isascii() or not tensor.isprintable():
        raise fault(name, "has a name that is empty or not printable ASCII", tensor=tensor or "?")
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise fault(name, "must have exactly dtype, shape and data_offsets", tensor=tensor)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise fault(name, f"has the unknown dtype {shown(dtype)}", tensor=tensor)
    if not _are_integers(shape, minimum=1) or len(shape) > MAX_RANK:
        raise fault(name, f"has shape {shown(shape)}; up to {MAX_RANK} positive integers are possible", tensor=tensor)
    if not _are_integers(offsets, minimum=0) or len(offsets) != 2:
        raise fault(name, f"has data_offsets {shown(offsets)}; two integers from 0 are possible", tensor=tensor)
    begin, end = offsets
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != needed:
        cause = f"spans {end - begin} bytes, but shape {shown(shape)} of {dtype} needs {shown(needed)}"
        raise fault(name, cause, tensor=tensor)
    entry_shape = tuple(shape)
    start, stop = data_start + begin, data_start + end
    return TensorEntry(name=tensor, file=name, dtype=dtype, shape=entry_shape, start=start, stop=stop)


def _are_integers(values: Any, *, minimum: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and minimum <= value < 2**63 for value in values)


def _check_cover(entries: Mapping[str, TensorEntry], data_start: int, file_bytes: int, name: str) -> None:
    """The tensors, in order of offset, must follow each other from the first data byte to the file's last."""
    position = data_start
    for entry in sorted(entries.values(), key=lambda entry: entry.start):
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise fault(name, f"{kind}: starts at byte {entry.start}, not {position}", tensor=entry.name)
        if entry.stop > file_bytes:
            cause = f"ends at byte {entry.stop} of a file of {file_bytes}: the file is cut short, download it again"
            raise fault(name, cause, tensor=entry.name)
        position = entry.stop
    if position != file_bytes:
        raise fault(name, f"has {file_bytes - position} bytes behind its last tensor")
