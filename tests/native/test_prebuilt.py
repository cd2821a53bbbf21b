"""Libraries made in advance: the best that the processor runs is taken, one of other sources never."""

import subprocess
import sys
from pathlib import Path

import pytest

from llama4_dist.native import prebuilt
from llama4_dist.native.library import SOURCES
from llama4_dist.native.prebuilt import LEVELS, build, file_name, find_prebuilt

HASWELL = "flags\t\t: fpu avx2 bmi1 bmi2 f16c fma abm movbe sse2\n"
SKYLAKE = HASWELL.strip() + " avx512f avx512bw avx512cd avx512dq avx512vl\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for level in LEVELS:
        (tmp_path / file_name(level)).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("cpuinfo", "level"),
    [(SKYLAKE, "x86-64-v4"), (HASWELL, "x86-64-v3"), ("flags\t: fpu sse2\n", None), ("Features : asimd\n", None)],
)
def test_a_processor_gets_the_best_level_it_runs(folder: Path, cpuinfo: str, level: str | None) -> None:
    assert find_prebuilt(folder, cpuinfo) == (folder / file_name(level) if level else None)


def test_a_library_of_other_sources_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prebuilt, "SOURCES", SOURCES[1:])
    assert find_prebuilt(folder, SKYLAKE) is None


def test_no_compiler_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-compiler"):
        build(tmp_path, "no-such-compiler")


@pytest.mark.slow
def test_a_machine_without_a_compiler_computes_by_a_library_made_elsewhere(tmp_path: Path) -> None:
    made = build(tmp_path / "made")
    assert [path.name for path in made] == [file_name(level) for level in LEVELS]
    code = """
import sys
from llama4_dist.native.library import library
from llama4_dist.native.extension import extension
print(library())
assert extension() is not None
"""
    environment = {
        "LLAMA4_DIST_NATIVE_LIBRARY": str(tmp_path / "made"),
        "CXX": "no-such-compiler",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()) in made
