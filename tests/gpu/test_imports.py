"""The GPU path and its checks need torch, Triton, numpy and safetensors: a bare machine with a card can run them.

Checks of engines and hosts need psutil, msgpack and xxhash too.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKED = ("grpc", "google", "msgpack", "prometheus_client", "psutil", "pydantic", "ray", "tiktoken", "xxhash", "yaml")
OF_ENGINES = ("msgpack", "psutil", "xxhash")
PROGRAM = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
sys.path[:0] = ["tools"]
import gpu_checks.decode, gpu_checks.model, gpu_checks.products, gpu_checks.rows, gpu_checks.attention, gpu_checks.hosts
import tests.checkpoints, tests.model.direct
{more}
"""


def run(more: str, blocked: tuple[str, ...] = BLOCKED) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(blocked=blocked, more=more)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


def test_nothing_else_is_imported() -> None:
    done = run("")
    assert done.returncode == 0, done.stderr


def test_a_host_of_its_own_needs_what_an_engine_needs() -> None:
    blocked = tuple(name for name in BLOCKED if name not in OF_ENGINES)
    done = run("import gpu_checks.host_process, gpu_checks.host_client, llama4_dist.gpu.decoder", blocked)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BLOCKED)
def test_the_blocks_hold(name: str) -> None:
    done = run(f"import {name}")
    assert "ModuleNotFoundError" in done.stderr
