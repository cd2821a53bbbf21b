"""Chooses by name which tensors of a synthetic checkpoint get random values; pure.

A pattern is a glob over canonical names. A routed expert's matrix is matched under the name of its own linear
(`model.layers.L.feed_forward.experts.E.gate_proj.weight`) in either layout, so that one expert can be chosen.
`layers=A-B` and `layers=A` stand for all tensors of those layers, routed experts included.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from llama4_dist.checkpoint.names import ExpertLayout, expected_tensors
from llama4_dist.config import ModelConfig
from llama4_dist.errors import ConfigError

_LAYERS = re.compile(r"layers=([0-9]{1,6})(?:-([0-9]{1,6}))?")


def chooser(config: ModelConfig, patterns: Sequence[str]) -> Callable[[str], bool]:
    """Return whether a name is chosen by any of `patterns`; ConfigError for a pattern that chooses nothing."""
    names = expected_tensors(config, ExpertLayout.PER_EXPERT)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = set(_matched(pattern, names))
        if not matched:
            raise ConfigError(
                f"--fill {pattern!r} names no tensor of this geometry: give a glob such as "
                "'model.layers.0.*', or layers=0-3"
            )
        chosen |= matched
    return chosen.__contains__


def _matched(pattern: str, names: Sequence[str] | dict[str, tuple[int, ...]]) -> Iterator[str]:
    layers = _LAYERS.fullmatch(pattern)
    if layers is None:
        return (name for name in names if fnmatchcase(name, pattern))
    first, last = int(layers[1]), int(layers[2] or layers[1])
    prefixes = tuple(f"model.layers.{layer}." for layer in range(first, min(last, 10**4) + 1))
    return (name for name in names if name.startswith(prefixes))
