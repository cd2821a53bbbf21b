"""Expert hosts as the tests hold them: a process each, started, asked, armed, killed; knows nothing of routes."""

import json
import socket
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.planning.placement import Pair
from cluster.worker import HostAddress
from llama4_dist.chaos.faults.fault import Fault, must
from llama4_dist.chaos.faults.processes import Kill, Process, Stop
from llama4_dist.errors import EngineError
from tests.faults.namespaces import Node
from tests.matrix.host_process import MAX_MESSAGE

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 60.0
STRIKE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a host runs: `node` is the machine it says it is on, `namespace` the network it is in."""

    node: str = "here"
    address: str = "127.0.0.1"
    namespace: str = ""

    @classmethod
    def on(cls, node: Node) -> "Site":
        return cls(node=node.namespace, address=node.address, namespace=node.namespace)


HERE = Site()


class HostProcess:
    """One life of a host."""

    def __init__(self, name: str, strings: socket.socket) -> None:
        self.name = name
        self._strings = strings
        strings.settimeout(CALL_TIMEOUT_S)
        self.pid: int = self._answer()["pid"]
        self.process = Process.of(self.pid)

    def call(self, name: str, **arguments: Any) -> Any:
        """Give an order and wait for what comes of it."""
        self._strings.send(json.dumps([name, arguments]).encode())
        answer = self._answer()
        if "error" in answer:
            raise EngineError(answer["error"], reason=answer["reason"])
        return answer["value"]

    def load(self, pairs: Collection[Pair]) -> HostAddress:
        return HostAddress(**self.call("load", pairs=sorted(pairs)))

    def arm(self, point: str, *, after: int = 1, action: str = "kill") -> None:
        self.call("arm", point=point, after=after, action=action)

    def fingerprints(self, pairs: Collection[Pair]) -> dict[Pair, str]:
        found = self.call("fingerprints", pairs=sorted(pairs))
        return {(layer, expert): digest for layer, expert, digest in found}

    @property
    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = self.call("stats")
        return found

    def close(self) -> None:
        """End it, whatever state it is in."""
        if not self.process.is_dead:
            Kill(self.pid).inject()
            must(lambda: self.process.is_dead, f"{self.name} is gone", timeout_s=STRIKE_TIMEOUT_S)
        self._strings.close()

    def _answer(self) -> dict[str, Any]:
        message = self._strings.recv(MAX_MESSAGE)
        if not message:
            raise ConnectionResetError(f"{self.name} is dead")
        answer: dict[str, Any] = json.loads(message)
        return answer


class Nursery:
    """The process that forks hosts. `spawn` takes a few milliseconds."""

    def __init__(self) -> None:
        self._orders, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            program = [sys.executable, "-m", "tests.matrix.nursery", str(far.fileno())]
            self._process = subprocess.Popen(program, cwd=ROOT, pass_fds=(far.fileno(),))
        self._orders.settimeout(START_TIMEOUT_S)
        assert self._orders.recv(64) == b"ready", "the nursery died at its start"

    def spawn(
        self, name: str, *, site: Site, model_dir: Path, run_dir: Path, secret: bytes, expert_slices: int = 1
    ) -> HostProcess:
        order = {
            "host": name, "node": site.node, "address": site.address, "namespace": site.namespace,
            "model_dir": str(model_dir), "run_dir": str(run_dir), "secret": secret.hex(),
            "expert_slices": expert_slices,
        }  # fmt: skip
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            socket.send_fds(self._orders, [json.dumps(order).encode()], [far.fileno()])
        return HostProcess(name, near)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._orders.close()
        self._process.wait(60)


class KillAt(Fault):
    """SIGKILL of a host at a point of its own choosing of work; `aim` is the host that is really armed."""

    def __init__(self, host: HostProcess, point: str, *, after: int = 1, aim: HostProcess | None = None) -> None:
        self._host, self._point, self._after, self._aim = host, point, after, aim or host

    def inject(self) -> None:
        self._aim.arm(self._point, after=self._after)

    def verify(self) -> None:
        timeout_s = STRIKE_TIMEOUT_S if self._aim is self._host else 0.5
        must(lambda: self._host.process.is_dead, f"{self._host.name} died {self._point}", timeout_s=timeout_s)

    def heal(self) -> None:
        return  # a new life is the caller's to begin

    def verify_healed(self) -> None:
        self.verify()


class StopAt(Stop):
    """SIGSTOP of a host at a point of its work, and SIGCONT."""

    def __init__(self, host: HostProcess, point: str, *, after: int = 1) -> None:
        super().__init__(host.pid)
        self._host, self._point, self._after = host, point, after

    def inject(self) -> None:
        self._host.arm(self._point, after=self._after, action="stop")


class KillAll(Fault):
    """SIGKILL of several processes at once."""

    def __init__(self, hosts: Collection[HostProcess]) -> None:
        self._kills = [Kill(host.pid) for host in hosts]

    def inject(self) -> None:
        for kill in self._kills:
            kill.inject()

    def verify(self) -> None:
        for kill in self._kills:
            kill.verify()

    def heal(self) -> None:
        return  # new lives are the caller's to begin

    def verify_healed(self) -> None:
        self.verify()
