"""Reads every byte of a checkpoint once: SHA-256 against a manifest, and weights that are no numbers.

The manifest is `manifest.sha256` in the format of `sha256sum`; without it a flipped bit cannot be told from a weight.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor

from llama4_dist.checkpoint.directory import has_file, open_file, read_exactly, read_small_file
from llama4_dist.checkpoint.fault import fault, shown
from llama4_dist.checkpoint.header import TensorEntry

MANIFEST = "manifest.sha256"
CHUNK_BYTES = 8 * 1024 * 1024
CHUNK_ELEMENTS = 1024 * 1024

Advance = Callable[[int], None]  # bytes done since the last call


def read_manifest(directory: Path, required: Collection[str]) -> dict[str, str]:
    """Return file name → SHA-256 (hex), empty without a manifest; raise CheckpointError unless it lists `required`."""
    if not has_file(directory, MANIFEST):
        return {}
    digests: dict[str, str] = {}
    for line in read_small_file(directory, MANIFEST).decode("utf-8", "replace").splitlines():
        digest, _, name = line.partition(" ")
        name = name[1:]  # sha256sum puts a second blank, or * for binary mode, before the name
        if len(digest) != 64 or not set(digest.lower()) <= set("0123456789abcdef") or not name or name in digests:
            raise fault(MANIFEST, f"has the line {shown(line)}; 'SHA-256  name' once for each file is expected")
        digests[name] = digest.lower()
    for name in sorted(required):
        if name not in digests:
            raise fault(name, f"is not listed in {MANIFEST}")
    return digests


def check_digest(directory: Path, name: str, expected: str, advance: Advance) -> None:
    """Raise CheckpointError if the SHA-256 of file `name` is not `expected`."""
    digest = hashlib.sha256()
    with open_file(directory, name) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        missing = os.fstat(file.fileno()).st_size
        while missing:
            chunk = read_exactly(file, min(missing, CHUNK_BYTES), name)
            digest.update(chunk)
            advance(len(chunk))
            missing -= len(chunk)
    if digest.hexdigest() != expected:
        raise fault(name, f"has SHA-256 {digest.hexdigest()}, {MANIFEST} says {expected}: download the file again")


def check_finite(tensors: Iterable[tuple[TensorEntry, Tensor]], advance: Advance) -> None:
    """Raise CheckpointError for the first tensor that holds NaN or an infinity."""
    for entry, tensor in tensors:
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), CHUNK_ELEMENTS):
            chunk = flat[start : start + CHUNK_ELEMENTS]
            finite = (chunk.float() if chunk.dtype == torch.float8_e4m3fn else chunk).isfinite()
            if not finite.all():
                position = start + int((~finite).nonzero()[0])
                cause = f"holds {float(flat[position])} at element {position}: the file is damaged"
                raise fault(entry.file, cause, tensor=entry.name)
            advance(chunk.numel() * chunk.element_size())
