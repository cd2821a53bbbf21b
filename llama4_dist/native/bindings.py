"""The signatures of the compiled passes over activations: structures and functions as the C++ files declare them."""

import ctypes
from ctypes import POINTER, Structure, c_double, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

from llama4_dist.native.library import library

NAMES = ("float32", "bfloat16")  # of stored weights, caches and rows, as in the functions' names
WEIGHT_NAMES = (*NAMES, "int8")


class FeedForwardShape(Structure):
    """`l4d::FeedForward`: widths, and the strides between rows of a weight as stored; stride 0 = packed."""

    _fields_ = (("width", c_int64), ("hidden", c_int64), ("gate_stride", c_int64), ("down_stride", c_int64))


class Groups(Structure):
    """`l4d::Groups`: rows of several experts and the addresses of their weights."""

    _fields_ = (
        *(("num_groups", c_int64), ("first_rows", c_void_p), ("nums_rows", c_void_p)),
        *(("gates", c_void_p), ("ups", c_void_p), ("downs", c_void_p)),
    )


class AttentionLayer(Structure):
    """`l4d::AttentionLayer`."""

    _fields_ = (
        *(("width", c_int64), ("num_heads", c_int64), ("num_kv_heads", c_int64), ("head_dim", c_int64)),
        *(("has_rope", c_int64), ("has_qk_norm", c_int64), ("has_temperature", c_int64)),
        *(("eps", c_double), ("norm", c_void_p), ("qkv", c_void_p), ("o", c_void_p)),
    )


class AttentionStep(Structure):
    """`l4d::AttentionStep`."""

    _fields_ = (
        *(("num_tokens", c_int64), ("rotation", c_void_p), ("temperature", c_void_p)),
        *(("slots", c_void_p), ("num_blocks", c_int64), ("blocks", c_void_p)),
    )


class Cache(Structure):
    """`l4d::Cache`: keys and values of one layer."""

    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("num_kv_heads", c_int64), ("head_dim", c_int64))


class Router(Structure):
    """`l4d::Router`."""

    _fields_ = (
        *(("width", c_int64), ("num_experts", c_int64), ("experts_per_token", c_int64)),
        *(("eps", c_double), ("norm", c_void_p), ("weight", c_void_p)),
    )


QUERY_BLOCK_FIELDS = 6  # `l4d::QueryBlock`: row, queries, first key, keys, address of the pages, page size

_FEED_FORWARD = (
    POINTER(FeedForwardShape),
    POINTER(Groups),
    *(c_void_p, c_int64, c_int64, c_void_p, c_int),  # x, its stride, rows, out, threads
)
_LINEAR = (c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int)
_ATTENTION = (POINTER(AttentionLayer), POINTER(AttentionStep), POINTER(Cache), c_void_p, c_void_p, c_int)
_ROUTE = (POINTER(Router), c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int)
_SCAN = (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int)
_ADD_OUTPUTS = (c_void_p, c_void_p, c_void_p, c_int64, c_int)
_QUANTISE = (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int)
_NORM = (c_void_p, c_void_p, c_int64, c_int64, c_double, c_void_p)


@cache
def passes() -> Any | None:
    """Return the compiled passes, None where there is no compiler; a call lets other Python threads run."""
    path = library()
    if path is None:
        return None
    loaded = ctypes.CDLL(str(path))
    for name in NAMES:
        _declare(loaded, f"l4d_route_{name}", _ROUTE)
        _declare(loaded, f"l4d_add_outputs_{name}", _ADD_OUTPUTS)
        _declare(loaded, f"l4d_quantise_{name}", _QUANTISE)
    for name in WEIGHT_NAMES:
        _declare(loaded, f"l4d_linear_{name}", _LINEAR)
        for cache_name in NAMES:
            _declare(loaded, f"l4d_attention_{name}_{cache_name}", _ATTENTION)
    _declare(loaded, "l4d_linear_float8", _LINEAR)
    for name in (*WEIGHT_NAMES, "float8"):
        for rows in NAMES:
            _declare(loaded, f"l4d_feed_forward_{name}_{rows}", _FEED_FORWARD)
    _declare(loaded, "l4d_norm", _NORM)
    _declare(loaded, "l4d_scan_logits", _SCAN)
    loaded.l4d_strip.restype = c_int64
    return loaded


def _declare(loaded: ctypes.CDLL, name: str, argtypes: tuple[Any, ...]) -> None:
    function = getattr(loaded, name)
    function.argtypes = argtypes
    function.restype = None
