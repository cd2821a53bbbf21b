"""Small synthetic checkpoints for the tests of this folder."""

from pathlib import Path
from typing import Any

from llama4_dist.checkpoint.names import ExpertLayout
from llama4_dist.checkpoint.writing.synth import SynthReport, SynthRequest, synthesise

NARROW = (
    "hidden_size=48",
    "num_hidden_layers=4",
    "num_attention_heads=3",
    "num_key_value_heads=1",
    "head_dim=16",
    "intermediate_size=64",
    "intermediate_size_mlp=128",
    "num_local_experts=4",
    "interleave_moe_layer_step=2",
    "vocab_size=320",
    "bos_token_id=256",
    "eos_token_id=[257]",
    "pad_token_id=258",
    "attention_chunk_size=16",
    "max_position_embeddings=1024",
)
PER_EXPERT, FUSED = ExpertLayout.PER_EXPERT, ExpertLayout.FUSED


def narrow(out: Path, *overrides: str, **fields: Any) -> SynthReport:
    """Write a checkpoint of Scout's kind, 48 wide; `overrides` replace more keys, `fields` those of the request."""
    fields = {"preset": "scout", "dtype": "float32"} | fields
    return synthesise(SynthRequest(overrides=(*NARROW, *overrides), **fields), out)


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}
