"""Bytes of a number in each format, and of a token's row on the wire; knows no hardware."""

from llama4_dist.errors import ConfigError

GROUP = 128  # columns that share a scale
_HEADER = 16  # bytes of a frame's header and row descriptors that fall on one row
# int4 stores a 16-bit scale per group of weights beside them; scales per output (fp8, int8) are less than 0.1 %.
WEIGHT_BYTES = {"float32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2 / GROUP}
KV_BYTES = {"float32": 4, "bf16": 2, "fp8": 1, "int8": 1}
_WIRE_BYTES = {"float32": 4, "bf16": 2, "fp8": 1, "int8": 1}
_SCALED = frozenset({"fp8", "int8"})
WIRES = tuple(_WIRE_BYTES)


def weight_bytes(dtype: str) -> float:
    """Return b_w, the bytes of a weight with its share of scales."""
    return WEIGHT_BYTES[known("dtype", dtype, WEIGHT_BYTES)]


def kv_bytes(dtype: str) -> int:
    """Return b_kv, the bytes of one number of a key or a value."""
    return KV_BYTES[known("kv_dtype", dtype, KV_BYTES)]


def dispatch_bytes(hidden_size: int, wire: str) -> float:
    """Return D, the bytes of one row on its way to an expert: numbers, a float32 scale per 128, a header's share."""
    scales = hidden_size / GROUP * 4 if wire in _SCALED else 0.0
    return hidden_size * _WIRE_BYTES[known("wire", wire, _WIRE_BYTES)] + scales + _HEADER


def combine_bytes(hidden_size: int, wire: str) -> float:
    """Return C, the bytes of one row on its way back; results are never sent in 8 bits."""
    return hidden_size * max(2, _WIRE_BYTES[known("wire", wire, _WIRE_BYTES)]) + _HEADER


def known(field: str, name: str, among: "dict[str, int] | dict[str, float]") -> str:
    """Return `name` if it is one of the formats; ConfigError otherwise."""
    if name not in among:
        raise ConfigError(f"{field}={name!r} is no format: choose one of {', '.join(among)}")
    return name
