"""Every kernel of a step compiles for a Hopper GPU, on any machine: warpgroup products, no registers spilled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MAX_SPILLS = 16  # the prefill of attention spills a few words outside its loop over keys


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    # In a process of its own: this one may have the kernels in the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compile_kernels"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout))


pytestmark = pytest.mark.slow


def test_every_kernel_of_a_step_is_compiled(kernels: list[dict[str, Any]]) -> None:
    assert {kernel["name"] for kernel in kernels} == {
        "add_and_norm_kernel",
        "attend_kernel",
        "group_rows_kernel",
        "grouped_gemm_kernel",
        "merge_splits_kernel",
        "rotate_and_store_kernel",
        "stream_kernel",
    }


def test_matrix_kernels_use_warpgroup_products(kernels: list[dict[str, Any]]) -> None:
    names = {"attend_kernel", "grouped_gemm_kernel", "stream_kernel"}
    products = [kernel["num_warpgroup_products"] for kernel in kernels if kernel["name"] in names]
    assert len(products) > 5
    assert min(products) > 0


def test_registers_suffice(kernels: list[dict[str, Any]]) -> None:
    assert {kernel["name"]: kernel["num_spills"] for kernel in kernels if kernel["num_spills"] > MAX_SPILLS} == {}


def test_shared_memory_suffices(kernels: list[dict[str, Any]]) -> None:
    assert max(kernel["shared_bytes"] for kernel in kernels) <= 227 << 10


def test_a_row_that_is_updated_in_place_is_loaded_once(kernels: list[dict[str, Any]]) -> None:
    # Loaded by two threads, it could be read by one after the other has stored it.
    loads = [kernel["num_row_loads"] for kernel in kernels if kernel["name"] == "add_and_norm_kernel"]
    assert len(loads) >= 11
    assert set(loads) == {1}
