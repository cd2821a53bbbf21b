"""A cluster of fake workers under the real controller and driver's half, and what must be true when it rests."""

from collections.abc import Mapping
from typing import Any

import pytest

from cluster.driver.driver_control import DriverControl
from cluster.driver.processes import ClusterProcesses
from cluster.operation import ChangeOptions, Operation, Phase
from cluster.worker import Topology
from tests.cluster.fake_workers import GEOMETRY, FakeAttention
from tests.cluster.fakes import FakeSpawner, plan
from tests.waiting import PATIENCE_S, wait_until

FAST = {
    "driver.processes.ORDERS_INTERVAL_S": 0.005,
    "driver.processes.ENGINES_RETRY_S": 0.02,
    "control_plane.watch.INTERVAL_S": 0.02,
    "control_plane.watch.ANSWER_TIMEOUT_S": 0.3,
    "control_plane.watch.FIRST_PAUSE_S": 0.05,
    "control_plane.watch.LONGEST_PAUSE_S": 0.1,
    "control_plane.revival.FIRST_PAUSE_S": 0.05,
    "control_plane.revival.LONGEST_PAUSE_S": 0.1,
    "control_plane.forming.FIRST_PAUSE_S": 0.05,
    "control_plane.forming.LONGEST_PAUSE_S": 0.1,
    "control_plane.following.PROGRESS_INTERVAL_S": 0.02,
}


def hasten(monkeypatch: pytest.MonkeyPatch, **timeouts_s: float) -> None:
    """Let what takes seconds take milliseconds; `change__LOAD_TIMEOUT_S=…` sets another of the control plane."""
    others = {f"control_plane.{name.replace('__', '.')}": seconds for name, seconds in timeouts_s.items()}
    for name, seconds in (FAST | others).items():
        monkeypatch.setattr(f"cluster.{name}", seconds)


class SmallCluster:
    """Started when it is built; `close` it."""

    def __init__(
        self,
        num_experts: int = 2,
        num_attention: int = 2,
        *,
        spawner: FakeSpawner | None = None,
        num_replicas: int = 1,
        **options: Any,
    ) -> None:
        self.spawner = spawner or FakeSpawner()
        self.plan = plan(num_experts, num_attention, num_replicas=num_replicas, **options)
        self.engines: dict[str, str] = {}
        self.unreachable: set[str] = set()  # workers whose engine nobody can use now
        self.processes = ClusterProcesses(self.plan, self.spawner, on_engines=self._note_engines)
        self.control = DriverControl(self.processes)
        self.engines |= self.processes.start(timeout_s=5)

    def _note_engines(self, engines: Mapping[str, str]) -> bool:
        self.engines = {worker: address for worker, address in engines.items() if worker not in self.unreachable}
        return len(self.engines) == len(engines)

    @property
    def topology(self) -> Topology:
        return self.spawner.controller.topology

    def end_of(self, operation: Operation) -> Operation:
        """Wait until an operation has ended."""
        ledger = self.spawner.controller.ledger
        ended = ledger.wait(operation.name, PATIENCE_S)
        assert ended.phase.final, f"{operation.name} is still {ended.phase}"
        return ended

    def scale(self, num_hosts: int, **options: Any) -> Operation:
        """Scale and wait for the end."""
        return self.end_of(self.control.scale(num_hosts, options=ChangeOptions(**options)))

    def scale_well(self, num_hosts: int) -> Operation:
        """Scale, which must work and leave everything in order."""
        ended = self.scale(num_hosts)
        assert ended.phase is Phase.DONE, ended
        self.rest()
        assert len(self.topology.hosts) == num_hosts
        return ended

    def scale_when_free(self, num_hosts: int) -> Operation:
        """As `scale_well`; repairs that are under way may end before."""
        wait_until(lambda: not self.spawner.controller.ledger.running)
        self.rest()
        return self.scale_well(num_hosts)

    def rest(self) -> None:
        """Wait until everything is in order, and say what is not if that does not happen."""
        wait_until(lambda: not self.disorder(), self.disorder)

    def disorder(self) -> list[str]:
        """Say what is not as it must be while nothing happens."""
        controller, spawner = self.spawner.controller, self.spawner
        topology = controller.topology
        found = list(spawner.breaches)
        if self.processes._controller is None:
            found.append("there is no controller")
        if controller.ledger.running:
            found.append(f"{controller.ledger.running} runs")
        serving = {worker.name: worker for worker in spawner.serving() if worker.served}
        if serving.keys() != {one.worker for one in self.plan.attention}:
            found.append(f"attention workers {sorted(serving)} serve")
        found += [f"{name} follows {one.epochs}" for name, one in serving.items() if one.topology_in_use != topology]
        found += self._disorder_of_groups()
        if self.engines != {name: one.where for name, one in serving.items()}:
            found.append(f"engines {self.engines}")
        if set(self.processes._workers) != set(spawner.workers) - spawner.dead:
            found.append(f"the driver knows {sorted(self.processes._workers)}")
        return [*found, *self._disorder_of_hosts(topology)]

    def _disorder_of_groups(self) -> list[str]:
        found: list[str] = []
        for group in self.plan.groups:
            of_group = [self.spawner.workers[name] for name in group.all if name not in self.spawner.dead]
            members = [one for one in of_group if isinstance(one, FakeAttention)]
            if len({one.number for one in members} - {0}) != 1 or not all(one.number for one in members):
                found.append(f"{group.leader} is formed as {[(one.name, one.number) for one in members]}")
            found += [f"{one.name} follows {one.epochs}" for one in members if one.topology_in_use != self.topology]
        return found

    def _disorder_of_hosts(self, topology: Topology) -> list[str]:
        found: list[str] = []
        hosts = self.spawner.hosts()
        if hosts.keys() != topology.hosts.keys():
            found.append(f"hosts {sorted(hosts)} live, the topology names {sorted(topology.hosts)}")
        for name, host in hosts.items():
            if name in topology.hosts and topology.hosts[name].incarnation != host.incarnation:
                found.append(f"{name} lives another life than the topology says")
            if host.held != set(topology.placement.held_by(name)):
                found.append(f"{name} holds {sorted(host.held)}, not {topology.placement.held_by(name)}")
        wanted = min(self.plan.num_replicas, len(topology.hosts))
        few = [pair for pair in GEOMETRY.pairs if len(topology.placement.hosts_of.get(pair, ())) < wanted]
        if few and self.plan.host_capacity_bytes is None:
            found.append(f"too few copies of {few}")
        return found

    def attention(self, index: int = 0) -> FakeAttention:
        worker = self.spawner.workers[f"attention-{index}"]
        assert isinstance(worker, FakeAttention)
        return worker

    def close(self) -> None:
        self.spawner.faults.clear()
        self.processes.close()
