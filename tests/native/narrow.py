"""The native passes as processors with narrower vectors have them, compiled once for all tests of a run."""

import ctypes
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llama4_dist.model.cpu import attention, feed_forward, moe, norm, panels, quantise, quantised
from llama4_dist.native import bindings, library

# Tuned for a processor for which g++ would by itself leave products unfused.
AVX2 = ("-march=x86-64-v3", "-mtune=znver2")
NO_AVX2 = ("-march=x86-64-v3", "-mno-avx2", "-mtune=znver2")  # vectors of four
BUILDS = pytest.mark.parametrize("flags", [AVX2, NO_AVX2], ids=["AVX2", "no AVX2"])


def narrow_passes(flags: tuple[str, ...]) -> ctypes.CDLL:
    """Return the passes of a build with further flags; the test is left out where this processor cannot run it."""
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.read_text().split() if cpuinfo.exists() else []
    if not {"avx2", "fma"} <= set(known):
        pytest.skip("this processor has no AVX2 with fused products")
    return _compiled(flags)


@contextmanager
def computing_with(native: Any) -> Iterator[None]:
    """Have the model's passes be those of this build."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, feed_forward, moe, norm, panels, quantise, quantised):
            patch.setattr(module, "passes", lambda: native)
        feed_forward._passes.cache_clear()
        yield
    feed_forward._passes.cache_clear()


@cache
def _compiled(flags: tuple[str, ...]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "narrow.so"
        sources = [source for source in library.SOURCES if source.name != "dispatch.cpp"]  # it computes nothing
        library.compile_into("g++", path, sources, (*library.FLAGS, *flags))
        patch.setattr(bindings, "library", lambda: path)
        loaded = bindings.passes.__wrapped__()
    assert isinstance(loaded, ctypes.CDLL)
    return loaded
