"""A group's leader and members as plain objects in this process, with an expert host, over real sockets and gloo."""

import threading
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.control_plane.forming import form
from cluster.control_plane.members import Members
from cluster.data_plane.expert_host import ExpertHost
from cluster.data_plane.group_leader import GroupLeader
from cluster.data_plane.stage_worker import StageWorker
from cluster.plan import Group, stages_of
from cluster.planning.placement import HostSlot, place
from cluster.ray_engine import read_geometry
from cluster.worker import Location, Role, Topology, WorkerConfig
from llama4_dist.engine.group import EngineGroup
from llama4_dist.engine.options import EngineOptions
from llama4_dist.partition import Partition
from llama4_dist.rpc.remote_engine import RemoteEngine

SECRET = b"s" * 32
HERE = Location(node="here", address="127.0.0.1")
ELSEWHERE = Location(node="elsewhere", address="127.0.0.1")
OPTIONS = EngineOptions(num_blocks=200, max_num_seqs=8, expert_timeout_s=20.0)
WIDE = Partition(num_stages=2, num_ranks=2)


class LocalHandle:
    """A worker of this process, called as over Ray."""

    def __init__(self, worker: Any, config: WorkerConfig) -> None:
        self.worker, self.role, self.plain = config.worker, config.role, worker

    def call(self, method: str, *arguments: object) -> Future[Any]:
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(getattr(self.plain, method)(*arguments))
            except Exception as error:  # noqa: BLE001 - carried to the caller
                answer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return answer

    def kill(self) -> None:
        self.plain.close()


class Cluster:
    """One expert host and one group, which `form`s as a controller would have it."""

    def __init__(self, model_dir: Path, run_dir: Path, partition: Partition, resources: ExitStack) -> None:
        self.model_dir, self.resources = model_dir, resources
        self.leader = WorkerConfig(
            worker="attention-0", role=Role.ATTENTION, model_dir=model_dir, dtype="auto", device="cpu", num_threads=1,
            run_dir=run_dir, secret=SECRET, options=OPTIONS, partition=partition,
        )  # fmt: skip
        self.stages = {one.worker: one for one in stages_of(self.leader, num_threads=1)}
        self.group = Group(leader="attention-0", members=tuple(self.stages))
        host = self.expert_host = ExpertHost(replace(self.leader, worker="expert-0", role=Role.EXPERT), HERE)
        resources.callback(host.close)
        placement = place(read_geometry(model_dir, "auto"), [HostSlot(host="expert-0", node="here")], num_replicas=1)
        hosts = {"expert-0": host.load(placement.held_by("expert-0"))}
        self.topology = Topology(epoch=1, placement=placement, hosts=hosts)
        self.members = Members([])
        for config in (self.leader, *self.stages.values()):
            self.start(config)

    def start(self, config: WorkerConfig, location: Location | None = None, *, follows: bool = True) -> Any:
        """Start a worker, in place of the one of its name; the second stage is on another node."""
        worker = self.fresh(config, location)
        worker.load()
        if follows:
            worker.connect(self.topology.hosts)
            worker.publish(self.topology)
        self.members.add([LocalHandle(worker, config)])
        return worker

    def fresh(self, config: WorkerConfig, location: Location | None = None) -> Any:
        """Make a worker that has not loaded."""
        location = location or (ELSEWHERE if config.stage else HERE)
        worker = GroupLeader(config, HERE) if config.leads else StageWorker(config, location)
        self.resources.callback(worker.close)
        return worker

    def form(self, number: int) -> None:
        form(self.members, self.group, number)

    def plain(self, name: str) -> Any:
        (handle,) = self.members.named([name])
        return handle.plain  # type: ignore[attr-defined]

    def formations(self) -> set[int]:
        return {handle.plain.status().formation for handle in self.members.all}  # type: ignore[attr-defined]


def serve(cluster: Cluster) -> EngineGroup:
    engine = RemoteEngine(cluster.plain("attention-0").serve(), secret=SECRET)
    group = EngineGroup([engine])
    cluster.resources.callback(group.close)
    return group
