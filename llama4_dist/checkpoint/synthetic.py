"""What a synthetic checkpoint says of itself in config.json, under a key that no other reader knows.

Random weights and holes look like any others; nobody must take what they compute for a model's words.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama4_dist.checkpoint.config_fields import Fields
from llama4_dist.checkpoint.config_file import CONFIG
from llama4_dist.checkpoint.directory import read_small_file
from llama4_dist.checkpoint.fault import shown
from llama4_dist.checkpoint.presets import SYNTHETIC
from llama4_dist.checkpoint.strict_json import parse_object

KEY = "_llama4_dist"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """How a synthetic checkpoint was made."""

    preset: str
    scale: str
    weights: str  # random | holes | partly random
    seed: int
    overrides: tuple[str, ...] = ()
    fill: tuple[str, ...] = ()

    @property
    def geometry(self) -> str:
        """Whose geometry it is."""
        if self.preset in SYNTHETIC:
            return f"{self.preset}: this project's own geometry, never published"
        return f"{self.preset}: the published geometry" + (
            "" if self.scale == "1" and not self.overrides else ", changed"
        )


def origin_section(origin: Origin) -> dict[str, Any]:
    """Return what goes into config.json."""
    return {KEY: {"synthetic": asdict(origin) | {"geometry": origin.geometry}}}


def read_origin(directory: Path) -> Origin | None:
    """Read how the checkpoint was made; None if it does not say that it is synthetic."""
    top = Fields(parse_object(read_small_file(directory, CONFIG), CONFIG), CONFIG)
    if not top.has(KEY) or not top.section(KEY).has("synthetic"):
        return None
    fields = top.section(KEY).section("synthetic")
    return Origin(
        preset=fields.string("preset"),
        scale=fields.string("scale"),
        weights=fields.string("weights"),
        seed=fields.integer("seed", minimum=0, maximum=2**63 - 1),
        overrides=_strings(fields, "overrides"),
        fill=_strings(fields, "fill"),
    )


def _strings(fields: Fields, key: str) -> tuple[str, ...]:
    values = fields.find(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise fields.fault(key, f"is {shown(values)}; a list of strings is expected")
    return tuple(values)
