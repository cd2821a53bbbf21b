"""Reads the manifest of a directory that holds a part of a checkpoint, or the whole of it in other files.

`part.json` states the model hash of the whole, so that hosts which opened different parts know that they serve one
model, and what the part holds, so that a missing tensor is told from one that was never meant to be here.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llama4_dist.checkpoint.config_fields import Fields
from llama4_dist.checkpoint.directory import has_file, read_small_file
from llama4_dist.checkpoint.expert_blocks import ExpertRun, part_shapes
from llama4_dist.checkpoint.fault import fault, shown
from llama4_dist.checkpoint.names import ExpertLayout, Shape, expected_tensors, is_routed
from llama4_dist.checkpoint.strict_json import parse_object
from llama4_dist.config import ModelConfig

PART = "part.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a directory holds of the checkpoint whose hash is `model_hash`; `tensors` None = all of it."""

    model_hash: str
    config_hash: str
    layout: ExpertLayout
    label: str  # which part it is, for people
    tensors: tuple[str, ...] | None = None  # canonical names, without routed experts
    experts: tuple[ExpertRun, ...] = ()

    def shapes(self, config: ModelConfig) -> dict[str, Shape]:
        """Return every tensor that the directory must hold, by canonical name."""
        everything = expected_tensors(config, self.layout)
        if self.tensors is None:
            return everything
        shapes = {name: everything[name] for name in self.tensors}
        for run in self.experts:
            shapes.update(part_shapes(config, self.layout, run))
        return shapes


def held_runs(part: Part) -> Mapping[tuple[int, int], Sequence[ExpertRun]] | None:
    """Return the slices held of each (layer, expert); None where the directory holds everything."""
    if part.tensors is None:
        return None
    held: dict[tuple[int, int], list[ExpertRun]] = {}
    for run in part.experts:
        held.setdefault((run.layer, run.expert), []).append(run)
    return held


def config_hash(config: ModelConfig) -> str:
    """Return a sha256 of the geometry alone."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()


def part_json(part: Part) -> str:
    """Return the manifest's text."""
    return json.dumps({"format": 1} | asdict(part)) + "\n"


def read_part(directory: Path, config: ModelConfig) -> Part | None:
    """Read `directory`/part.json if there is one; CheckpointError where it does not fit the config beside it."""
    if not has_file(directory, PART):
        return None
    content = parse_object(read_small_file(directory, PART), PART)
    fields = Fields(content, PART)
    fields.integer("format", minimum=1, maximum=1)
    part = Part(
        model_hash=_digest(fields, "model_hash"),
        config_hash=_digest(fields, "config_hash"),
        layout=_layout(fields),
        label=fields.string("label"),
        tensors=_tensors(fields, config) if fields.has("tensors") else None,
        experts=tuple(_runs(content, config)),
    )
    if part.config_hash != config_hash(config):
        raise fault(PART, "belongs to another config.json: cut the part again, or restore its config.json")
    return part


def _digest(fields: Fields, key: str) -> str:
    digest = fields.string(key)
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise fields.fault(key, f"is {shown(digest)}; 64 hexadecimal digits are expected")
    return digest


def _layout(fields: Fields) -> ExpertLayout:
    layout = fields.string("layout")
    if layout not in [one.value for one in ExpertLayout]:
        raise fields.fault("layout", f"is {shown(layout)}; {' or '.join(ExpertLayout)} is expected")
    return ExpertLayout(layout)


def _tensors(fields: Fields, config: ModelConfig) -> tuple[str, ...]:
    listed = fields.find("tensors")
    known = {name for name in expected_tensors(config) if not is_routed(name)}
    if not isinstance(listed, list):
        raise fields.fault("tensors", f"is {shown(listed)}; a list of names is expected")
    for name in listed:
        if not isinstance(name, str) or name not in known:
            raise fields.fault("tensors", f"lists {shown(name)}, which this geometry does not have")
    return tuple(listed)


def _runs(content: Mapping[str, object], config: ModelConfig) -> list[ExpertRun]:
    listed = content.get("experts", [])
    if not isinstance(listed, list):
        raise fault(PART, f"experts is {shown(listed)}; a list is expected")
    runs = []
    for one in listed:
        if not isinstance(one, list) or len(one) != 4 or not all(type(number) is int for number in one):
            raise fault(PART, f"experts holds {shown(one)}; [layer, expert, start, stop] is expected")
        run = ExpertRun(*one)
        inside = run.layer in config.moe_layer_ids and 0 <= run.expert < config.num_experts
        if not inside or not 0 <= run.start < run.stop <= config.expert_width:
            raise fault(PART, f"experts holds {shown(one)}, which this geometry does not have")
        runs.append(run)
    return runs
