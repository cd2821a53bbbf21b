"""What every test may rely on, whoever runs it and beside whom: said before any test imports the project."""

import os
import shutil
import signal
import tempfile
from itertools import count
from pathlib import Path

import pytest
import torch

SLOW_TIMEOUT_S = 600  # of a test that hangs; others are given less in pyproject.toml
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run in its interpreter

# What runs in the background of a shell, or as pytest's worker, ignores Ctrl-C, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A parent that has loaded readline leaves its terminal's size here, and tables would be as narrow.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

# Each worker of pytest has temporary files of its own, so that what one leaves behind is not found by another.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER is not None:
    folder = Path(tempfile.gettempdir()) / f"t{os.getpid():x}"  # short: paths of sockets have 107 bytes
    folder.mkdir(mode=0o700)
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; `make gpu-check` checks the same on one"))
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
    longest_first(items)


def longest_first(items: list[pytest.Item]) -> None:
    """Begin with files that have slow tests, then those with Ray's, so that no worker ends long after the others."""
    place = count()
    rank: dict[Path, tuple[bool, bool, int]] = {}
    for item in items:
        is_slow, is_ray = (item.get_closest_marker(marker) is not None for marker in ("slow", "ray"))
        slow, ray, first = rank.get(item.path, (False, False, next(place)))
        rank[item.path] = (slow or is_slow, ray or is_ray, first)
    items.sort(key=lambda item: (not rank[item.path][0], not rank[item.path][1], rank[item.path][2]))


def pytest_unconfigure() -> None:
    if WORKER is not None:
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
