"""Compiles the C++ files beside it for this machine, once, and finds the result again. Knows none of their functions.

Compiled here and not shipped, because the passes pay only with the vector width of the very processor. The library is
kept in the user's cache under a name that hashes sources, compiler, flags and processor, so that a home shared by
machines of different kinds serves all of them. Without a compiler everything works, with library calls instead;
`prebuilt.py` serves machines that shall have none.
"""

import atexit
import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
# A product and its sum are fused, as in the library whose bits these passes must have.
FLAGS = (
    *("-std=c++20", "-O3", "-pthread", "-fPIC"),
    *("-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast"),
    "--param=avoid-fma-max-bits=0",  # for Zen 2 and 3, g++ would leave some products of narrow vectors unfused
    f"-I{sysconfig.get_path('include')}",  # a Python module is among them; without its headers it is left out
)
COMPILE_TIMEOUT_S = 120
SWITCH = "LLAMA4_DIST_NATIVE"  # 0 leaves the passes out


@cache
def library() -> Path | None:
    """Return the compiled library, or None with the reason logged."""
    if os.environ.get(SWITCH, "1") == "0":
        log.info("native_passes_off variable=%s", SWITCH)
        return None
    if made := os.environ.get("LLAMA4_DIST_NATIVE_LIBRARY"):
        from llama4_dist.native.prebuilt import find_prebuilt  # which needs this module's sources

        prebuilt = find_prebuilt(Path(made), _cpuinfo())
        if prebuilt is not None:
            return prebuilt
    wanted = os.environ.get("CXX", "g++")
    compiler = shutil.which(wanted)
    if compiler is None:
        log.info("native_passes_off reason=no_compiler wanted=%s", wanted)
        return None
    try:
        folder = cache_folder()
        path = folder / f"{fingerprint(compiler)}.so"
        if not path.exists():  # who has one waits for nobody: others may compile other sources here
            with locked(folder):  # who comes second waits for the first one's library
                if not path.exists():
                    compile_into(compiler, path, SOURCES, FLAGS)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("native_passes_off reason=%s", _first_line(error))
        return None
    return path


def cache_folder() -> Path:
    """Return a folder that only this user can write: code is loaded from it."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "llama4_dist" / "native"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # a read-only home, or none: every process compiles for itself
        folder = Path(tempfile.mkdtemp(prefix="llama4_dist_native_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be written by others; `chmod 700` it")
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others that lock the folder out; the lock goes with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def fingerprint(compiler: str) -> str:
    """Return a name for what this compiler makes of these sources on this processor."""
    parts = [source.read_bytes() for source in (*SOURCES, *HEADERS)]
    parts += [_run([compiler, "--version"]), " ".join(FLAGS).encode(), _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def compile_into(compiler: str, path: Path, sources: Sequence[Path], flags: Sequence[str]) -> None:
    """Compile the files side by side; `path` appears complete or not at all, whoever compiles at the same time."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        commands = [
            [compiler, *flags, "-c", str(source), "-o", str(made)]
            for source, made in zip(sources, objects, strict=True)
        ]
        for _ in pool.map(_run, commands):
            pass  # the first that failed says why
        target = Path(folder) / path.name
        _run([compiler, *flags, "-shared", *map(str, objects), "-o", str(target)])
        target.replace(path)
    log.info("native_passes_compiled path=%s", path)


def _run(command: list[str]) -> bytes:
    """Run the compiler; return what it printed."""
    # The user chose the compiler; the arguments are ours.
    return subprocess.run(command, capture_output=True, check=True, timeout=COMPILE_TIMEOUT_S).stdout  # noqa: S603


def _processor() -> str:
    """Return what `-march=native` looks at."""
    text = _cpuinfo()
    if not text:
        return platform.processor()
    return "\n".join(re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", text.split("\n\n")[0], re.MULTILINE))


def _cpuinfo() -> str:
    """Return what the kernel says of the processors; nothing where it says nothing."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _first_line(error: Exception) -> str:
    """Return the compiler's own first complaint, where there is one."""
    printed = getattr(error, "stderr", None) or b""
    lines = printed.decode(errors="replace").splitlines() if isinstance(printed, bytes) else []
    return lines[0] if lines else str(error)
