"""Finds the geometry that a plan is for: a member of the family by name, or a checkpoint's config.json."""

from dataclasses import dataclass
from pathlib import Path

from llama4_dist.checkpoint.config_file import read_config
from llama4_dist.checkpoint.presets import PRESETS, SYNTHETIC, preset
from llama4_dist.config import ModelConfig
from llama4_dist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A geometry, what to call it, and whether it is one that nobody has published."""

    name: str
    config: ModelConfig
    synthetic: bool


def find_model(given: str) -> ModelSource:
    """Return the geometry of a name, or of a folder with a config.json; weights are not looked at."""
    if given.lower() in PRESETS:
        return ModelSource(name=given.lower(), config=preset(given.lower()), synthetic=given.lower() in SYNTHETIC)
    directory = Path(given)
    if not directory.is_dir():
        raise ConfigError(f"model {given!r} is neither {', '.join(PRESETS)} nor a checkpoint folder")
    return ModelSource(name=directory.resolve().name, config=read_config(directory), synthetic=False)
