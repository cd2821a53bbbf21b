"""The inside of one expert host process: a real ExpertHost that does what its test says over a socket; knows no test.

It lies when told to, as a host does whose memory or arithmetic is broken.
"""

import ctypes
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.data_plane.expert_host import ExpertHost
from cluster.worker import Location, Role, WorkerConfig
from llama4_dist.dispatch.fault_points import FaultPoints
from llama4_dist.dispatch.links.link import FrameHeader, FrameKind
from llama4_dist.dispatch.worker_link import WorkerLink
from llama4_dist.dispatch.worker_links import WorkerLinks
from llama4_dist.errors import Llama4Error
from llama4_dist.model.expert_store import ExpertStore

CLONE_NEWNET = 0x40000000  # sched.h
MAX_MESSAGE = 1 << 17
LIES = ("", "nan", "stale_layer", "other_rows", "flipped_bit", "wrong_echo")


class LyingStore(ExpertStore):
    """The experts of a host that is damaged: what it computes is wrong in the way that `lie` names."""

    lie = ""

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
        earlier = layer - 1 if self.lie == "stale_layer" and layer else layer
        held = all((earlier, expert) in self.holds for expert, _ in groups)
        super().__call__(earlier if held else layer, groups, x_RD, out_RD)
        if self.lie == "nan":
            out_RD[-1, -1] = torch.nan
        elif self.lie == "other_rows":
            out_RD.copy_(out_RD.roll(1, dims=0 if len(out_RD) > 1 else 1).clone())
        elif self.lie == "flipped_bit":
            out_RD.view(torch.int32)[0, 0] ^= 1 << 20


class LyingLinks(WorkerLinks):
    """Links of a server that answers in the name of another layer."""

    lie = ""
    num_layers = 0

    def post(self, worker: WorkerLink, header: FrameHeader, rows_RD: Tensor | None) -> None:
        if self.lie == "wrong_echo" and header.kind == FrameKind.REPLY:
            header = header._replace(layer=(header.layer + 1) % self.num_layers)
        super().post(worker, header, rows_RD)


class Puppet:
    """One host and the strings it hangs on: every public method is an order."""

    def __init__(self, order: dict[str, Any]) -> None:
        if order["namespace"]:
            enter_namespace(order["namespace"])
        self._faults = FaultPoints()
        config = WorkerConfig(
            worker=order["host"], role=Role.EXPERT, model_dir=Path(order["model_dir"]), dtype="auto", device="cpu",
            num_threads=1, run_dir=Path(order["run_dir"]), secret=bytes.fromhex(order["secret"]),
            expert_slices=order["expert_slices"],
        )  # fmt: skip
        location = Location(node=order["node"], address=order["address"])
        self._host = ExpertHost(config, location, faults=self._faults)

    def load(self, pairs: list[list[int]]) -> dict[str, Any]:
        return asdict(self._host.load([(layer, expert) for layer, expert in pairs]))

    def arm(self, point: str, after: int, action: str) -> None:
        self._faults.arm(point, after=after, action=action)

    def lie(self, kind: str) -> None:
        store, server = self._host._store, self._host._server
        assert kind in LIES
        assert store is not None
        assert server is not None
        store.__class__, server._workers.__class__ = LyingStore, LyingLinks
        LyingStore.lie = LyingLinks.lie = kind
        LyingLinks.num_layers = server.identity.num_layers

    def fingerprints(self, pairs: list[list[int]]) -> list[Any]:
        prints = self._host.fingerprints([(layer, expert) for layer, expert in pairs])
        return [[*pair, digest] for pair, digest in prints.items()]

    def keep(self, pairs: list[list[int]]) -> int:
        return self._host.keep([(layer, expert) for layer, expert in pairs])

    def stats(self) -> dict[str, Any]:
        stats = self._host.stats()
        return {
            "frames_in": stats.frames_in,
            "adopted": stats.adopted,
            "closed_links": dict(stats.closed_links),
            "rows": [[*pair, count] for pair, count in stats.rows_by_expert.items()],
        }

    def close(self) -> None:
        self._host.close()


def run_host(order: dict[str, Any], strings: socket.socket) -> None:
    """Say who we are, then obey until the test lets go."""
    puppet = Puppet(order)
    strings.send(json.dumps({"pid": os.getpid()}).encode())
    while message := strings.recv(MAX_MESSAGE):
        name, arguments = json.loads(message)
        try:
            answer = {"value": getattr(puppet, name)(**arguments)}
        except Llama4Error as error:
            answer = {"error": str(error), "reason": error.reason}
        strings.send(json.dumps(answer).encode())


def enter_namespace(name: str) -> None:
    """Move this process onto a node, before it has a second thread."""
    with Path(f"/run/netns/{name}").open() as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")
