"""In which format linear weights are multiplied: as stored, or as int8 made from that. Knows no arithmetic.

Attention, shared, dense and routed experts and the head have the format; router, norms and embedding are always as
stored. int8 has one float32 scale an output, activations stay as they are: `model.cpu.quantise` says what it loses.
"""

import torch

from llama4_dist.checkpoint.scheme import Scheme
from llama4_dist.errors import ConfigError
from llama4_dist.model.cpu.panels import is_native

STORED, INT8 = "stored", "int8"
WEIGHT_FORMATS = (STORED, INT8)


def check_weight_format(name: str, *, dtype: torch.dtype, device: torch.device | str) -> None:
    """Raise ConfigError for a name that is no format, and for a format that cannot be multiplied here."""
    check_weight_format_name(name, device)
    if name == INT8 and not is_native(dtype, device):
        raise ConfigError(
            f"weights='int8' is computed by native passes, which need a C++ compiler and float32 or bfloat16, not "
            f"{str(dtype).removeprefix('torch.')}: install g++, leave LLAMA4_DIST_NATIVE=0 out, or take 'stored'"
        )


def check_weight_format_name(name: str, device: torch.device | str) -> None:
    """Raise ConfigError for what no machine could do, without asking this one for a compiler."""
    if name not in WEIGHT_FORMATS:
        raise ConfigError(f"weights={name!r} is none of {', '.join(WEIGHT_FORMATS)}")
    if name == INT8 and torch.device(device).type != "cpu":
        raise ConfigError(f"weights='int8' is for processors, the device is {device}: take device='cpu' or 'stored'")


def check_stored_format(name: str, scheme: Scheme | None) -> None:
    """Raise ConfigError for a format other than the checkpoint's own where that is quantised already."""
    if scheme is not None and name != STORED:
        raise ConfigError(
            f"weights={name!r} would round once more what the checkpoint stores as {scheme.title}: take 'stored'"
        )
