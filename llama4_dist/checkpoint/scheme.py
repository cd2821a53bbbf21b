"""States how a checkpoint's linears are quantised: that part of `quantization_config` which is computed here.

The format is that of compressed-tensors (https://github.com/vllm-project/compressed-tensors, `quant_config.py` and
`quant_args.py`). Whether a linear is quantised is told by its stored tensors, never by the list of ignored modules.
Knows no tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from llama4_dist.checkpoint.config_fields import Fields
from llama4_dist.checkpoint.fault import shown
from llama4_dist.checkpoint.strict_json import parse_object

KEY = "quantization_config"
MAX_GROUP = 2**20
MAX_IGNORED = 1_000_000
PACKED_FORMAT, FLOAT_FORMAT, PLAIN_FORMATS = "pack-quantized", "float-quantized", ("int-quantized", "naive-quantized")
_ABSENT: tuple[Any, ...] = (None, False, [], {})  # what stands for "not asked for"


class Number(StrEnum):
    """What one quantised weight is: float8 e4m3, or a signed integer."""

    FLOAT8 = "float8"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        return 4 if self is Number.INT4 else 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Symmetric weights: number · scale, with a scale for an output, or for `group_size` inputs of an output.

    float8 weights are multiplied with rows that are rounded to float8 too, each by its own largest element.
    `is_packed`: 32 / bits integers in an int32, the first one lowest, each plus half its range.
    """

    number: Number
    group_size: int | None = None  # None: one scale an output
    is_packed: bool = False

    def num_groups(self, width: int) -> int:
        """Return the scales of an output of `width` inputs; ValueError where groups do not divide them."""
        if self.group_size is None:
            return 1
        if width % self.group_size:
            raise ValueError(f"{width} inputs do not divide into groups of {self.group_size}")
        return width // self.group_size

    @property
    def cut_unit(self) -> int:
        """Inputs that stay together in any cut: those that share a scale, or a byte."""
        return self.group_size or 8 // self.number.bits

    @property
    def title(self) -> str:
        """Name it for people."""
        by = "output" if self.group_size is None else f"{self.group_size} inputs"
        return f"{self.number}, a scale for each {by}"


def parse_scheme(raw: bytes, file: str) -> Scheme | None:
    """Return the scheme that the config.json `raw` states, None without one; CheckpointError names key and value."""
    top = Fields(parse_object(raw, file), file)
    for fields in (top, top.section("text_config") if top.has("text_config") else top):
        if fields.has(KEY):
            return _scheme(fields.section(KEY))
    return None


def scheme_json(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` that states `scheme` for every linear but those in `ignore`."""
    is_float = scheme.number is Number.FLOAT8
    weights: dict[str, Any] = {
        "num_bits": scheme.number.bits,
        "type": "float" if is_float else "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "observer": "minmax",
    }
    rows = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
    form = PACKED_FORMAT if scheme.is_packed else FLOAT_FORMAT if is_float else PLAIN_FORMATS[1]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": rows if is_float else None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"output_activations": None}},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def _scheme(config: Fields) -> Scheme:
    _expect(config, "quant_method", "compressed-tensors")
    _expect(config, "quantization_status", "compressed", "compressed")
    for key in ("kv_cache_scheme", "moe_sparsity_config", "sparsity_config"):
        _expect_absent(config, key)
    ignored = config.find("ignore", [])
    if not isinstance(ignored, list) or len(ignored) > MAX_IGNORED or not all(isinstance(n, str) for n in ignored):
        raise config.fault("ignore", f"is {shown(ignored)}; a list of module names is expected")
    groups = config.section("config_groups")
    names = groups.keys()
    if len(names) != 1:
        raise config.fault("config_groups", f"has {len(names)} groups; one for all quantised linears is supported")
    group = groups.section(names[0])
    form = config.string("format")
    if group.string("format", form) != form:
        raise group.fault("format", f"is {shown(group.find('format'))}, but that of the whole is {shown(form)}")
    _expect_absent(group, "output_activations")
    scheme = _weights(group.section("weights"), is_packed=form == PACKED_FORMAT)
    is_float = scheme.number is Number.FLOAT8
    expected = (FLOAT_FORMAT, "naive-quantized") if is_float else (PACKED_FORMAT, *PLAIN_FORMATS)
    if form not in expected or (scheme.number is Number.INT4 and not scheme.is_packed):
        raise config.fault("format", f"is {shown(form)}, which is not supported for {scheme.number} weights")
    if is_float:
        _check_rows(group)
    else:
        _expect_absent(group, "input_activations")
    return scheme


def _weights(weights: Fields, *, is_packed: bool) -> Scheme:
    kind = weights.string("type")
    bits = weights.integer("num_bits", minimum=1, maximum=64)
    number = {("float", 8): Number.FLOAT8, ("int", 8): Number.INT8, ("int", 4): Number.INT4}.get((kind, bits))
    if number is None:
        raise weights.fault("num_bits", f"is {bits} of type {shown(kind)}; float 8, int 8 and int 4 are supported")
    _expect(weights, "symmetric", True, True)
    for key in ("dynamic", "block_structure"):
        _expect_absent(weights, key)
    order = weights.find("actorder", None)
    if order not in (None, False, "weight", "static"):  # those two leave no trace in the file
        raise weights.fault("actorder", f"is {shown(order)}; inputs in another order are not supported")
    strategy = weights.string("strategy")
    if strategy == "channel":
        return Scheme(number=number, is_packed=is_packed)
    if strategy != "group" or number is Number.FLOAT8:
        choice = "channel" if number is Number.FLOAT8 else "channel or group"
        raise weights.fault("strategy", f"is {shown(strategy)}; {choice} is supported for {number}")
    group_size = weights.integer("group_size", minimum=2, maximum=MAX_GROUP)
    if group_size % 2:
        raise weights.fault("group_size", f"is {group_size}; an even number is expected: a byte holds two weights")
    return Scheme(number=number, group_size=group_size, is_packed=is_packed)


def _check_rows(group: Fields) -> None:
    """float8 weights stand for a product with rows rounded to float8 as they come, each row by itself."""
    rows = group.section("input_activations")
    for key, value in {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}.items():
        _expect(rows, key, value)
    _expect(rows, "symmetric", True, True)


def _expect(fields: Fields, key: str, value: Any, *default: Any) -> None:
    found = fields.find(key, *default)
    if type(found) is not type(value) or found != value:
        raise fields.fault(key, f"is {shown(found)}; {shown(value)} is supported")


def _expect_absent(fields: Fields, key: str) -> None:
    found = fields.find(key, None)
    if not any(found is value or found == value for value in _ABSENT):
        raise fields.fault(key, f"is {shown(found)}, which is not supported: it must be left out or null")
