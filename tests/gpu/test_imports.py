"""The GPU path and its checks need torch, Triton, numpy and safetensors: a bare machine with a card can run them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKED = ("grpc", "google", "msgpack", "prometheus_client", "psutil", "pydantic", "ray", "tiktoken", "xxhash", "yaml")
PROGRAM = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
sys.path[:0] = ["tools"]
import gpu_checks.decode, gpu_checks.model, gpu_checks.products, gpu_checks.rows, gpu_checks.attention
import tests.checkpoints, tests.model.direct
{more}
"""


def run(more: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(blocked=BLOCKED, more=more)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


def test_nothing_else_is_imported() -> None:
    done = run("")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BLOCKED)
def test_the_blocks_hold(name: str) -> None:
    done = run(f"import {name}")
    assert "ModuleNotFoundError" in done.stderr
