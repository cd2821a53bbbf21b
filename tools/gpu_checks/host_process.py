"""An expert host in a process of its own, asked by lines of JSON: `python -m gpu_checks.host_process experts …`.

Each line is a list, [command, argument, …], and is answered by one line; the process ends with its input. `timing` in
place of `experts` serves one layer that gives rows back as they are, and one of random experts of Scout's shape.
"""

import json
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.data_plane.expert_host import ExpertHost
from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.dispatch.handshake import HostIdentity
from llama4_dist.dispatch.links.link import LinkLimits
from llama4_dist.dispatch.links.listener import Listener
from llama4_dist.gpu.experts import GpuExperts
from tests.gpu.unix_hosts import SECRET, new_host

ECHO_LAYER, EXPERT_LAYER = 0, 1
NUM_EXPERTS = 8


class ExpertCommands:
    """Hosts of one checkpoint by dtype: `load`, `add` and `keep` take a dtype and pairs."""

    def __init__(self, name: str, model_dir: str, run_dir: str, device: str) -> None:
        self._new: Callable[[str], ExpertHost] = lambda dtype: new_host(
            name, Path(model_dir), Path(run_dir) / dtype, dtype=dtype, device=device
        )
        self._hosts: dict[str, ExpertHost] = {}

    def load(self, dtype: str, pairs: Sequence[Sequence[int]]) -> tuple[str, int]:
        host = self._hosts[dtype] = self._new(dtype)
        address = host.load(_pairs(pairs))
        return address.unix, address.incarnation

    def add(self, dtype: str, pairs: Sequence[Sequence[int]]) -> None:
        self._hosts[dtype].add(_pairs(pairs))

    def keep(self, dtype: str, pairs: Sequence[Sequence[int]]) -> None:
        self._hosts[dtype].keep(_pairs(pairs))


class EchoAndExperts:
    """Satisfies `dispatch.ExpertCompute`."""

    def __init__(self, width: int, expert_width: int, dtype: torch.dtype, device: str) -> None:
        self._experts = _random_experts(width, expert_width, dtype, device)
        self.holds = frozenset((layer, expert) for layer in (ECHO_LAYER, EXPERT_LAYER) for expert in range(NUM_EXPERTS))

    def adopt(self, pairs: Sequence[tuple[int, int]]) -> None:
        """All there is is here."""

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        if layer == ECHO_LAYER:
            out_RD.copy_(x_RD)
        else:
            self._experts(layer, groups, x_RD, out_RD)


class TimingCommands:
    """`load` takes the width, the experts' width and the name of the arithmetic."""

    def __init__(self, run_dir: str, device: str) -> None:
        self._address, self._device = f"unix:{run_dir}/timing.sock", device

    def load(self, width: int, expert_width: int, arithmetic: str) -> tuple[str, int]:
        identity = HostIdentity(
            host="timing",
            incarnation=1,
            model_hash="timing",
            num_layers=2,
            num_experts=NUM_EXPERTS,
            arithmetic=arithmetic,
        )
        dtype = torch.bfloat16
        compute = EchoAndExperts(width, expert_width, dtype, self._device)
        server = ExpertServer(identity=identity, compute=compute, width=width, dtype=dtype, limits=LinkLimits())
        listener = Listener(self._address, secret=SECRET)
        server.add_listener(listener)
        threading.Thread(target=server.run, args=(threading.Event(),), daemon=True).start()
        return listener.address, 1


def _random_experts(width: int, expert_width: int, dtype: torch.dtype, device: str) -> GpuExperts:
    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=shape[0] ** -0.5)

    experts = GpuExperts(width=width, expert_width=expert_width, num_experts=NUM_EXPERTS, dtype=dtype, device=device)
    for expert in range(NUM_EXPERTS):
        weights = ExpertWeights(
            gate_DF=normal(width, expert_width), up_DF=normal(width, expert_width), down_FD=normal(expert_width, width)
        )
        experts.put({(EXPERT_LAYER, expert): weights})
    return experts


def _pairs(pairs: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    return [(layer, expert) for layer, expert in pairs]


def main() -> None:
    kind, *arguments = sys.argv[1:]
    commands: Any = {"experts": ExpertCommands, "timing": TimingCommands}[kind](*arguments)
    for line in sys.stdin:
        command, *rest = json.loads(line)
        print(json.dumps(getattr(commands, command)(*rest)), flush=True)


if __name__ == "__main__":
    main()
