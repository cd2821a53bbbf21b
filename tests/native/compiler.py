"""The one reason to leave out tests of native passes: a machine without a compiler computes without them."""

import shutil

import pytest

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: the native passes are not compiled")
