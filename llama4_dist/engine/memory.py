"""How much memory a device has for an engine: what a processor has in all, or what is free on a CUDA device."""

import psutil
import torch


def memory_bytes(device: str) -> int:
    """Return the bytes of which keys and values may take a share (`kv_sizing`)."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().total)
