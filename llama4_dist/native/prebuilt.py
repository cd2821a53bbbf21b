"""Libraries that were compiled in advance, one per level of x86-64, for machines that shall have no compiler.

`python -m llama4_dist.native.prebuilt FOLDER` makes them; `LLAMA4_DIST_NATIVE_LIBRARY=FOLDER` uses them. A name holds a
hash of the sources and Python's ABI, so that a folder of another version is no library at all. Knows no function.
"""

import hashlib
import logging
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from llama4_dist.native.library import FLAGS, HEADERS, SOURCES, compile_into

log = logging.getLogger(__name__)

_V3 = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
# What a level of the x86-64 psABI demands, in the words of /proc/cpuinfo; the best first.
LEVELS: Mapping[str, frozenset[str]] = {
    "x86-64-v4": _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": _V3,
}


def find_prebuilt(folder: Path, cpuinfo: str) -> Path | None:
    """Return the best library of the folder that this processor runs; None, with the reason logged, if none fits."""
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    able = frozenset(found[1].split()) if found else frozenset()
    for level, needed in LEVELS.items():
        path = folder / file_name(level)
        if needed <= able and path.is_file():
            return path
    log.warning("native_prebuilt_unfit folder=%s wanted=%s", folder, " or ".join(map(file_name, LEVELS)))
    return None


def file_name(level: str) -> str:
    """Name the library of these sources for a level."""
    digest = hashlib.sha256(b"\0".join(source.read_bytes() for source in (*SOURCES, *HEADERS))).hexdigest()[:16]
    return f"{level}-{sysconfig.get_config_var('SOABI')}-{digest}.so"


def build(folder: Path, compiler: str = "g++") -> list[Path]:
    """Compile one library per level; raise OSError or SubprocessError where the compiler fails."""
    path = shutil.which(compiler)
    if path is None:
        raise FileNotFoundError(f"there is no compiler {compiler}: install one, or name it")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for level in LEVELS:
        flags = tuple(f"-march={level}" if flag == "-march=native" else flag for flag in FLAGS)
        compile_into(path, folder / file_name(level), SOURCES, flags)
        made.append(folder / file_name(level))
    return made


if __name__ == "__main__":
    for library in build(Path(sys.argv[1])):
        sys.stdout.write(f"{library}\n")
