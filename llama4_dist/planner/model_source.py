"""Finds the geometry that a plan is for: a member of the family by name, or a checkpoint's config.json."""

from dataclasses import dataclass
from pathlib import Path

from llama4_dist.checkpoint.config_file import CONFIG, parse_config
from llama4_dist.checkpoint.directory import read_small_file
from llama4_dist.checkpoint.presets import PRESETS, SYNTHETIC, preset
from llama4_dist.checkpoint.scheme import Number, parse_scheme
from llama4_dist.config import ModelConfig
from llama4_dist.errors import ConfigError

DEFAULT_DTYPE = "fp8"
_FORMATS = {Number.FLOAT8: "fp8", Number.INT8: "int8", Number.INT4: "int4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A geometry, what to call it, whether it is one that nobody has published, and in what format a plan takes it."""

    name: str
    config: ModelConfig
    synthetic: bool
    dtype: str = DEFAULT_DTYPE


def find_model(given: str) -> ModelSource:
    """Return the geometry of a name, or of a folder with a config.json; weights are not looked at.

    A folder that is quantised is planned in its own format.
    """
    if given.lower() in PRESETS:
        return ModelSource(name=given.lower(), config=preset(given.lower()), synthetic=given.lower() in SYNTHETIC)
    directory = Path(given)
    if not directory.is_dir():
        raise ConfigError(f"model {given!r} is neither {', '.join(PRESETS)} nor a checkpoint folder")
    raw = read_small_file(directory, CONFIG)
    scheme = parse_scheme(raw, CONFIG)
    return ModelSource(
        name=directory.resolve().name,
        config=parse_config(raw),
        synthetic=False,
        dtype=_FORMATS[scheme.number] if scheme else DEFAULT_DTYPE,
    )
