"""Picks the text tensors out of an index and holds them against what config.json promises; pure."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from llama4_dist.checkpoint.fault import fault, shown
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.index import INDEX, SINGLE, Index
from llama4_dist.checkpoint.names import (
    ExpertLayout,
    Shape,
    expected_tensors,
    gate_up_name,
    is_vision,
    stored_prefix,
)
from llama4_dist.checkpoint.part import Part
from llama4_dist.config import ModelConfig

log = logging.getLogger(__name__)

# What only a checkpoint in Meta's layout has (`writing.meta_layout`).
META_EMBEDDING = "tok_embeddings.weight"
STORED_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTensors:
    """What the text engine reads, by canonical name, and the stored names it leaves alone."""

    entries: Mapping[str, TensorEntry]
    layout: ExpertLayout
    unused: tuple[str, ...]


def select_text_tensors(config: ModelConfig, index: Index, part: Part | None = None) -> TextTensors:
    """Pick what the config, or a part's manifest, calls for.

    Raise CheckpointError for the first tensor that is missing or of another shape or dtype; log unknown ones."""
    prefix = stored_prefix(config)
    layout = part.layout if part else _layout(config, index, prefix)
    expected = part.shapes(config) if part else expected_tensors(config, layout)
    entries: dict[str, TensorEntry] = {}
    for name, shape in expected.items():
        entry = index.entries.get(prefix + name)
        if entry is None or entry.name in index.unlisted:
            file = SINGLE if SINGLE in index.shards else INDEX
            if META_EMBEDDING in index.entries:
                raise fault(
                    file, "is in Meta's layout: run `llama4-dist checkpoint convert --to hf` and open the result"
                )
            raise fault(file, "is missing, though config.json calls for it", tensor=prefix + name)
        check_entry(entry, shape, STORED_DTYPES[config.dtype])
        entries[name] = entry
    used = {entry.name for entry in entries.values()}
    unused = tuple(sorted(index.entries.keys() - used))
    unknown = [name for name in unused if not is_vision(name)]
    if unknown:
        log.warning("checkpoint_tensors_unknown count=%d first=%s", len(unknown), shown(unknown[0]))
    return TextTensors(entries=entries, layout=layout, unused=unused)


def _layout(config: ModelConfig, index: Index, prefix: str) -> ExpertLayout:
    first = config.moe_layer_ids[:1]
    if all(prefix + gate_up_name(layer) in index.entries for layer in first):
        return ExpertLayout.FUSED
    return ExpertLayout.PER_EXPERT


def check_entry(entry: TensorEntry, shape: Shape, dtype: str) -> None:
    """Raise CheckpointError unless a tensor has the shape and dtype (safetensors' name) that are called for."""
    if entry.shape != shape:
        cause = f"has shape {list(entry.shape)}; config.json calls for {list(shape)}"
        raise fault(entry.file, cause, tensor=entry.name)
    if entry.dtype != dtype:
        raise fault(entry.file, f"is {entry.dtype}; config.json's dtype calls for {dtype}", tensor=entry.name)
