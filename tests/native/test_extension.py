"""The Python module among the native files: there with Python's headers, done without where they are missing."""

import logging
from pathlib import Path

import pytest

from llama4_dist.native import extension as module
from llama4_dist.native import library as compiled
from tests.native.compiler import needs_compiler

pytestmark = needs_compiler


def test_it_is_loaded_once() -> None:
    first = module.extension()
    assert first is not None
    assert {"Codec", "lay_out", "look", "put_if_finite", "scale_in_order"} <= set(dir(first))
    assert module.extension() is first


def test_without_pythons_headers_there_is_none_and_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = tuple(flag for flag in compiled.FLAGS if not flag.startswith("-I"))
    monkeypatch.setattr(compiled, "FLAGS", flags)
    monkeypatch.setattr(compiled, "SOURCES", [path for path in compiled.SOURCES if path.name == "dispatch.cpp"])
    compiled.library.cache_clear()
    try:
        path = compiled.library.__wrapped__()
        assert path is not None, "the rest is compiled all the same"
        monkeypatch.setattr(module, "library", lambda: path)
        with caplog.at_level(logging.INFO):
            assert module.extension.__wrapped__() is None
        assert "native_dispatch_off" in caplog.text
    finally:
        compiled.library.cache_clear()
