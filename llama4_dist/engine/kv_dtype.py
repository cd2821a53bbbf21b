"""Which dtypes the KV cache may have, and where; asks the device what it can, allocates nothing."""

import torch

from llama4_dist.errors import ConfigError

KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8_e4m3": torch.float8_e4m3fn}
FLOAT8_CAPABILITY = (8, 9)  # Ada and Hopper are the first to convert and multiply it


def resolve_kv_dtype(name: str, *, compute_dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the dtype of a name; "auto" is `compute_dtype`. Raises ConfigError where the device cannot do it."""
    if name == "auto":
        return compute_dtype
    if name not in KV_DTYPES:
        raise ConfigError(f"kv_dtype={name!r} is none of auto, {', '.join(KV_DTYPES)}")
    if name == "float8_e4m3" and _capability(device) < FLOAT8_CAPABILITY:
        raise ConfigError(
            f"kv_dtype='float8_e4m3' needs a CUDA device of capability 8.9 or more, {device} is none: take bfloat16"
        )
    return KV_DTYPES[name]


def _capability(device: str) -> tuple[int, int]:
    is_cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device) if is_cuda else (0, 0)
