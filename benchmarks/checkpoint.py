"""The random checkpoint that the comparisons run on: Scout's shape with small widths and Scout's own constants."""

import subprocess
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).resolve().parents[1]

# 346 million parameters, nine tenths of them in 16 experts. Chunks, temperature and its floor are the published
# ones, because llama.cpp knows no others.
GEOMETRY: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1024,
    "intermediate_size_mlp": 2048,
    "vocab_size": 8192,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "max_position_embeddings": 262144,
}


def write_checkpoint(folder: Path, dtype: str, **overrides: Any) -> Path:
    """Write the checkpoint into `folder`, with some of its keys replaced, and return `folder`."""
    return make_checkpoint(folder, "scout", dtype=getattr(torch, dtype), **(GEOMETRY | overrides))


def commit() -> str:
    """Return the commit that is measured, with a plus sign if files differ from it; "unknown" outside a clone."""
    try:
        return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
