"""Writes tiny quantised checkpoints by compressed-tensors itself; shares no line with the reader it tests."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints import make_checkpoint, write_shards

ROWS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
INT8_GROUPS = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INT4_CHANNEL = {"num_bits": 4, "type": "int", "strategy": "channel"}
ALL = {"fp8": FP8, "int8": INT8, "int8-groups": INT8_GROUPS, "int4": INT4, "int4-channel": INT4_CHANNEL}
WIDE = {"int4-128": INT4 | {"group_size": 128}}  # for models whose widths are multiples of 128
PLAIN = {"int8-plain": INT8, "int8-groups-plain": INT8_GROUPS}  # int8 that is not packed into int32


def make_quantised(
    path: Path,
    name: str,
    preset: str = "scout",
    *,
    ignored_layers: Collection[int] = (),
    linears: bool = False,
    edit_scale: Callable[[Tensor], Tensor] = lambda scale: scale,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Write `preset` with its experts in the form `name`, those of `ignored_layers` in floats.

    With `linears` those of attention and of shared and dense networks have the form too.
    """
    make_checkpoint(path, preset, layout="per_expert", num_shards=1, dtype=dtype, **overrides)
    tensors = load_file(path / "model.safetensors")
    scheme, form = scheme_of(name)
    ignore = []
    stored: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        module, is_weight, _ = full_name.rpartition(".weight")
        is_linear = ".experts." in module or (linears and module.endswith("_proj"))
        if is_linear and not any(f".layers.{layer}." in module for layer in ignored_layers):
            stored |= {f"{module}.{part}": value for part, value in compress(tensor, scheme, form, edit_scale).items()}
        else:
            stored[full_name] = tensor
            if is_weight and tensor.ndim == 2:
                ignore.append(module)
    (path / "model.safetensors").unlink()
    write_shards(path, stored, 2)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=ignore
    )
    edit_config(path, lambda content: content.update(quantization_config=json.loads(config.model_dump_json())))
    return path


def scheme_of(name: str) -> tuple[QuantizationScheme, str]:
    """Return compressed-tensors' scheme and format of a form."""
    weights = (ALL | PLAIN | WIDE)[name]
    form = "float-quantized" if name == "fp8" else "naive-quantized" if name in PLAIN else "pack-quantized"
    rows = ROWS if name == "fp8" else None
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=rows), form


def compress(
    weight_FD: Tensor, scheme: QuantizationScheme, form: str, edit_scale: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Round a weight as compressed-tensors does, with min-max scales."""
    assert scheme.weights is not None
    groups = weight_FD.unflatten(1, (-1, scheme.weights.group_size or weight_FD.shape[1]))
    scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(form)
    found = compressor.compress({"weight": weight_FD, "weight_scale": scale}, scheme)
    return {
        name: (edit_scale(value) if name == "weight_scale" else value).contiguous() for name, value in found.items()
    }


def decompress(parts: dict[str, Tensor], name: str) -> Tensor:
    """Return the weight that compressed-tensors reads out of stored parts."""
    scheme, form = scheme_of(name)
    weight: Tensor = BaseCompressor.get_value_from_registry(form).decompress(parts, scheme)["weight"]
    return weight


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint by name."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit_config(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change config.json in place."""
    content = json.loads((path / "config.json").read_text())
    edit(content)
    (path / "config.json").write_text(json.dumps(content, indent=2))
