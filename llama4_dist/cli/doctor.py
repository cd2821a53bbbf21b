"""`llama4-dist doctor`: what this machine has and what is missing, one line a check."""

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import typer

from llama4_dist.cli.output import EXIT_FAILED, console, human_bytes, print_json

NEEDED = ("grpcio", "protobuf", "typer", "rich")
ENGINE = ("torch", "numpy", "safetensors", "tokenizers", "tiktoken", "msgpack", "xxhash", "pydantic")
CLUSTER = ("ray",)
MIN_SHARED_MEMORY = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding: `state` is ok, warning or error; `remedy` says what to do when it is not ok."""

    name: str
    state: str
    found: str
    remedy: str = ""


def run_doctor(as_json: bool) -> None:
    """Print every check; leave with 1 when one is an error."""
    checks = [check() for check in CHECKS]
    if as_json:
        print_json({"checks": [asdict(check) for check in checks]})
    else:
        marks = {"ok": "[green]ok[/]     ", "warning": "[yellow]warning[/]", "error": "[bold red]error[/]  "}
        for check in checks:
            console.print(f"{marks[check.state]} {check.name:<16} ", end="")
            remedy = f"  → {check.remedy}" if check.remedy else ""
            console.print(check.found + remedy, markup=False, highlight=False, soft_wrap=True)
    if any(check.state == "error" for check in checks):
        raise typer.Exit(EXIT_FAILED)


def _python() -> Check:
    return Check(name="python", state="ok", found=f"{platform.python_version()} at {sys.prefix}")


def _packages(name: str, packages: tuple[str, ...], extra: str, state: str) -> Check:
    versions: list[str] = []
    missing: list[str] = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        remedy = f"pip install 'llama4-dist{extra}'"
        return Check(name=name, state=state, found=f"missing: {', '.join(missing)}", remedy=remedy)
    return Check(name=name, state="ok", found=", ".join(versions))


def _protobuf() -> Check:
    from google.protobuf.internal import api_implementation

    found = str(api_implementation.Type())
    if found != "upb":
        remedy = "unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION: the pure Python parser has no depth limit"
        return Check(name="protobuf", state="error", found=found, remedy=remedy)
    return Check(name="protobuf", state="ok", found=found)


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check(name="cores", state="ok", found=f"{cores} usable of {os.cpu_count()}, {platform.machine()}")


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return Check(name="memory", state="warning", found="unknown on this system")
    return Check(name="memory", state="ok", found=f"{human_bytes(total)}, {human_bytes(free)} free")


def _shared_memory() -> Check:
    try:
        free = shutil.disk_usage("/dev/shm").free  # noqa: S108 (Ray's object store lives there)
    except OSError:
        return Check(name="shared memory", state="warning", found="no /dev/shm", remedy="Ray falls back to disk")
    if free < MIN_SHARED_MEMORY:
        remedy = "enlarge /dev/shm to 64 MiB or more for Ray"
        return Check(name="shared memory", state="warning", found=human_bytes(free), remedy=remedy)
    return Check(name="shared memory", state="ok", found=f"{human_bytes(free)} free in /dev/shm")


def _gpus() -> Check:
    try:
        import torch
    except ImportError:
        return Check(name="gpu", state="warning", found="torch is not installed")
    if not torch.cuda.is_available():
        return Check(name="gpu", state="ok", found="none; the CPU path is used")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check(name="gpu", state="ok", found=", ".join(names))


def _native_passes() -> Check:
    from llama4_dist.native.library import library

    path = library()
    if path is None:
        remedy = "install g++ (or set CXX) for faster experts and dispatch"
        return Check(name="native passes", state="warning", found="not compiled", remedy=remedy)
    return Check(name="native passes", state="ok", found=str(path))


def _loopback() -> Check:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 1):
            return Check(name="loopback", state="ok", found="listens and connects")
    except OSError as error:
        return Check(name="loopback", state="error", found=str(error.strerror), remedy="allow loopback TCP")


def _open_files() -> Check:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        remedy = "ulimit -n 65536 before serving many streams"
        return Check(name="open files", state="warning", found=str(soft), remedy=remedy)
    return Check(name="open files", state="ok", found=str(soft))


CHECKS: tuple[Callable[[], Check], ...] = (
    _python,
    lambda: _packages("client", NEEDED, "", "error"),
    lambda: _packages("engine", ENGINE, "[engine]", "warning"),
    lambda: _packages("cluster", CLUSTER, "[serve]", "warning"),
    _protobuf,
    _cores,
    _memory,
    _shared_memory,
    _gpus,
    _native_passes,
    _open_files,
    _loopback,
)
