"""Loads the Python module among the compiled files beside this one. Knows none of its functions."""

import importlib.util
import logging
from functools import cache
from importlib.machinery import ExtensionFileLoader
from types import ModuleType

from llama4_dist.native.library import library

log = logging.getLogger(__name__)

_NAME = "llama4_dist.native.dispatch"


@cache
def extension() -> ModuleType | None:
    """Return `native.dispatch`; None, with a logged reason, without a compiler or without Python's headers."""
    path = library()
    if path is None:
        return None
    loader = ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_loader(_NAME, loader)
    assert spec is not None, "a loader was given"
    try:
        module = importlib.util.module_from_spec(spec)
    except ImportError as error:  # compiled without Python.h
        log.info("native_dispatch_off reason=%s", error)
        return None
    loader.exec_module(module)
    return module
