"""The native library is compiled once, kept where only its user can write, and done without when it cannot be had."""

import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llama4_dist.native import library as module
from llama4_dist.native.library import library
from tests.native.compiler import needs_compiler

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, and no memory of earlier answers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.cache_clear()
    yield tmp_path / "cache" / "llama4_dist" / "native"
    library.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a shell script in the compiler's place; it can call the real one as g++."""

    def install(script: str) -> None:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))

    return install


def test_it_is_compiled_once_and_found_again(own_cache: Path, compiler: Callable[[str], None], tmp_path: Path) -> None:
    compiler(f'case "$*" in *--version*) ;; *) echo run >> {tmp_path}/runs ;; esac\nexec g++ "$@"')
    first = library()
    assert first is not None
    assert first.parent == own_cache
    assert hasattr(ctypes.CDLL(str(first)), "l4d_feed_forward_float32_float32")
    runs = (tmp_path / "runs").read_text()
    library.cache_clear()
    assert library() == first
    assert (tmp_path / "runs").read_text() == runs
    assert [path.name for path in own_cache.iterdir()] == [first.name]


def test_other_sources_flags_or_processors_get_a_library_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [module.fingerprint("g++")]
    monkeypatch.setattr(module, "FLAGS", (*module.FLAGS, "-O2"))
    names.append(module.fingerprint("g++"))
    monkeypatch.setattr(module, "_processor", lambda: "another")
    names.append(module.fingerprint("g++"))
    monkeypatch.setattr(module, "SOURCES", module.SOURCES[:0])
    names.append(module.fingerprint("g++"))
    assert len(set(names)) == 4


def test_processes_that_compile_at_once_end_with_one_library(own_cache: Path) -> None:
    code = "from llama4_dist.native.library import library; print(library())"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(answers) == 1
    assert [str(path) for path in own_cache.iterdir()] == list(answers)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            'case "$*" in *--version*) echo 1 ;; *) echo "first complaint" >&2; echo more >&2; exit 1 ;; esac',
            "first complaint",
        ),
        ("exit 3", "exit status 3"),
    ],
)
def test_a_compiler_that_fails_is_done_without(
    own_cache: Path, compiler: Callable[[str], None], caplog: pytest.LogCaptureFixture, script: str, reason: str
) -> None:
    compiler(script)
    assert library() is None
    assert reason in caplog.text
    assert list(own_cache.iterdir()) == []


def test_no_compiler_and_switched_off_are_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert library() is None
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("LLAMA4_DIST_NATIVE", "0")
    library.cache_clear()
    assert library() is None
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_code_is_not_loaded_from_a_folder_that_others_can_write(
    own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_cache.mkdir(parents=True)
    own_cache.chmod(0o777)
    assert library() is None
    assert "chmod 700" in caplog.text


@pytest.mark.parametrize("home", ["a file where the folder should be", "no home at all"])
def test_a_cache_that_cannot_be_made_is_replaced_for_this_process(tmp_path: Path, home: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    code = """if True:
        import ctypes, pathlib, sys
        from llama4_dist.native.library import library

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        if sys.argv[1] == "no home at all":
            pathlib.Path.home = no_home
        path = library()
        ctypes.CDLL(str(path))
        print(oct(path.parent.stat().st_mode & 0o777), path.parent.parent)
    """
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    environment["TMPDIR"] = str(tmp_path / "temporary")
    if home != "no home at all":
        environment["XDG_CACHE_HOME"] = str(tmp_path / "file")
    done = subprocess.run(
        [sys.executable, "-c", code, home], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.stdout.split() == ["0o700", str(tmp_path / "temporary")], done.stderr
    assert list((tmp_path / "temporary").iterdir()) == []  # and taken away with it


def test_a_compiler_that_hangs_is_done_without(
    compiler: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler("exec sleep 60")
    monkeypatch.setattr(module, "COMPILE_TIMEOUT_S", 0.2)
    assert library() is None
    assert "timed out" in caplog.text
