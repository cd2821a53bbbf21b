"""Picks the text tensors out of an index and holds them against what config.json promises; pure."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llama4_dist.checkpoint.expert_blocks import PROJECTIONS, part_names
from llama4_dist.checkpoint.fault import fault, shown
from llama4_dist.checkpoint.header import TensorEntry
from llama4_dist.checkpoint.index import INDEX, SINGLE, Index
from llama4_dist.checkpoint.names import (
    ExpertLayout,
    Shape,
    expected_tensors,
    expert_linear_name,
    gate_up_name,
    is_vision,
    stored_prefix,
)
from llama4_dist.checkpoint.part import Part
from llama4_dist.checkpoint.quantised_tensors import QuantisedEntry, find_quantised
from llama4_dist.checkpoint.scheme import Scheme
from llama4_dist.config import ModelConfig

log = logging.getLogger(__name__)

# What only a checkpoint in Meta's layout has (`writing.meta_layout`).
META_EMBEDDING = "tok_embeddings.weight"
STORED_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTensors:
    """What the text engine reads, by canonical name, and the stored names it leaves alone.

    `entries` are all stored tensors; those of a quantised linear are in `quantised` too, by the name of its weight.
    """

    entries: Mapping[str, TensorEntry]
    quantised: Mapping[str, QuantisedEntry]
    layout: ExpertLayout
    unused: tuple[str, ...]


def select_text_tensors(
    config: ModelConfig, index: Index, part: Part | None = None, scheme: Scheme | None = None
) -> TextTensors:
    """Pick what the config, or a part's manifest, calls for; linears may be quantised as `scheme` says.

    Raise CheckpointError for the first tensor that is missing or of another shape or dtype; log unknown ones.
    """
    prefix = stored_prefix(config)
    layout = part.layout if part else _layout(config, index, prefix)
    expected = part.shapes(config) if part else expected_tensors(config, layout)
    listed = {name: entry for name, entry in index.entries.items() if name not in index.unlisted}
    entries: dict[str, TensorEntry] = {}
    quantised: dict[str, QuantisedEntry] = {}
    for name, shape in expected.items():
        found = find_quantised(prefix + name, shape, scheme, listed)
        if found is not None:
            quantised[name] = found
            entries |= {entry.name.removeprefix(prefix): entry for entry in found.tensors()}
            continue
        entry = listed.get(prefix + name)
        if entry is None:
            file = SINGLE if SINGLE in index.shards else INDEX
            if META_EMBEDDING in index.entries:
                raise fault(
                    file, "is in Meta's layout: run `llama4-dist checkpoint convert --to hf` and open the result"
                )
            raise fault(file, "is missing, though config.json calls for it", tensor=prefix + name)
        check_entry(entry, shape, STORED_DTYPES[config.dtype])
        entries[name] = entry
    if layout is ExpertLayout.PER_EXPERT and quantised:
        _check_experts_whole(_experts(config, part), entries, quantised)
    used = {entry.name for entry in entries.values()}
    unused = tuple(sorted(index.entries.keys() - used))
    unknown = [name for name in unused if not is_vision(name)]
    if unknown:
        log.warning("checkpoint_tensors_unknown count=%d first=%s", len(unknown), shown(unknown[0]))
    return TextTensors(entries=entries, quantised=quantised, layout=layout, unused=unused)


def _check_experts_whole(
    experts: Iterable[Sequence[str]], entries: Mapping[str, TensorEntry], quantised: Mapping[str, QuantisedEntry]
) -> None:
    """An expert is one function of one format: its three linears are quantised, or none is."""
    for names in experts:
        plain = [name for name in names if name not in quantised]
        if 0 < len(plain) < len(names):
            entry = entries[plain[0]]
            raise fault(entry.file, "is not quantised, but its expert's other linears are", tensor=entry.name)


def _experts(config: ModelConfig, part: Part | None) -> Iterator[list[str]]:
    """Yield the names of each expert's linears, or of what a part holds of it."""
    if part is not None and part.tensors is not None:
        yield from (part_names(ExpertLayout.PER_EXPERT, run) for run in part.experts)
        return
    for layer in config.moe_layer_ids:
        for expert in range(config.num_experts):
            yield [expert_linear_name(layer, expert, one) for one in PROJECTIONS]


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
