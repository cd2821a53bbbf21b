"""Overlays, built once."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tools.manifests.objects import Overlay, build

ROOT = Path(__file__).parents[2]
OVERLAYS = ROOT / "deploy" / "kubernetes" / "overlays"
NAMES = sorted(path.name for path in OVERLAYS.iterdir() if path.is_dir())


@cache
def built(name: str) -> Overlay:
    return build(OVERLAYS / name)


@pytest.fixture
def overlay() -> Callable[[str], Overlay]:
    """Return a copy of an overlay that a test may break."""

    def copy(name: str) -> Overlay:
        return replace(built(name), objects=deepcopy(built(name).objects))

    return copy
