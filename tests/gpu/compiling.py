"""Compiles what a launcher would launch, for a Hopper GPU, on a machine without one; launches nothing."""

import json
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What the assembler says of one kernel; `num_warpgroup_products` counts its wgmma instructions."""

    name: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    num_warpgroup_products: int
    num_spills: int  # loads and stores of local memory in the machine code
    num_row_loads: int  # of the variable `total`: the row that `add_and_norm` updates in place


class HopperDriver:
    """Answers what the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError


def compile_launches() -> list[Any]:
    """From now on, for this whole process, a launch compiles only; return the list that receives its kernel."""
    kernels: list[Any] = []

    def launcher(self: JITFunction[Any], grid: Any) -> Any:
        return lambda *args, **kwargs: kernels.append(self.run(*args, grid=grid, warmup=True, **kwargs))

    triton.runtime.driver.set_active(HopperDriver())
    JITFunction.__getitem__ = launcher
    return kernels


def examine(kernel: Any) -> Compiled:
    """Read the resource table and the machine code of a compiled kernel."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _dump("--dump-resource-usage", file.name)
        code = _dump("--dump-sass", file.name)
    fields = dict(word.split(":", 1) for word in usage.split("Function")[1].split() if word.count(":") == 1)
    return Compiled(
        name=kernel.name,
        registers=int(fields["REG"]),
        stack_bytes=int(fields["STACK"]),
        local_bytes=int(fields["LOCAL"]),
        shared_bytes=kernel.metadata.shared,
        num_warpgroup_products=kernel.asm["ptx"].count("wgmma.mma_async"),
        num_row_loads=len(re.findall(r"%total(_\d+)? = tt\.load", kernel.asm["ttgir"])),
        num_spills=code.count("LDL") + code.count("STL"),
    )


def print_json(kernels: Iterable[Any]) -> None:
    print(json.dumps([asdict(examine(kernel)) for kernel in kernels]))


def _dump(option: str, path: str) -> str:
    return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout
