"""A cluster without Ray: expert hosts in processes of their own, attention workers here, real sockets between them."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.data_plane.attention_worker import AttentionWorker
from cluster.planning.placement import HostSlot, Placement, place
from cluster.ray_engine import read_geometry
from cluster.worker import HostAddress, Location, Role, Topology, WorkerConfig
from llama4_dist.chaos.faults.fault import must
from llama4_dist.chaos.history.reference import Reference
from llama4_dist.dispatch.links.link import Link
from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.engine.options import EngineOptions
from llama4_dist.request import EngineRequest
from llama4_dist.rpc.remote_engine import RemoteEngine
from tests.faults.namespaces import Node
from tests.faults.proxy import Proxy
from tests.matrix.hosts import HERE, HostProcess, Nursery, Site
from tests.matrix.load import Load
from tests.waiting import PATIENCE_S

SECRET = b"s" * 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a cluster is to be."""

    num_hosts: int = 3
    num_replicas: int = 2
    num_workers: int = 1
    sites: Sequence[Site] = (HERE,)  # of the hosts, in turn
    worker_node: Node | None = None  # the network that attention workers dial from
    worker_is_elsewhere: bool = False  # so that links are TCP
    model_dirs: Mapping[str, Path] = field(default_factory=dict)  # of hosts that have a copy of their own
    cross_check_every: int = 256
    expert_timeout_s: float = 20.0
    expert_slices: int = 1


class WorkerOnNode(AttentionWorker):
    """An attention worker whose links begin on a node."""

    node: Node | None = None

    def load(self) -> None:
        super().load()
        links, dial = self._follower.links, self._follower.links._dial

        def dial_from_node(address: HostAddress) -> Link:
            return dial(address) if self.node is None else self.node.inside(lambda: dial(address))

        links._dial = dial_from_node


class Cluster:
    """Hosts, workers, and the topology that the workers were given last."""

    def __init__(self, nursery: Nursery, spec: Spec, *, model_dir: Path, run_dir: Path, resources: ExitStack) -> None:
        self.spec = spec
        self._nursery, self._model_dir, self._run_dir, self._resources = nursery, model_dir, run_dir, resources
        names = [f"expert-{index}" for index in range(spec.num_hosts)]
        self._sites = {name: spec.sites[index % len(spec.sites)] for index, name in enumerate(names)}
        self.placement = self.place(names)
        self.addresses: dict[str, HostAddress] = {}
        self.hosts: dict[str, HostProcess] = {}
        self.detours: dict[str, str] = {}  # host to the address that workers are told instead of its own
        self.epoch = 0
        for name in names:
            self.hosts[name] = self.spawn(name)
        for name in names:
            self.addresses[name] = self.hosts[name].load(self.placement.held_by(name))
        self.workers: list[WorkerOnNode] = []
        self.engines: list[RemoteEngine] = []

    def place(self, names: Sequence[str]) -> Placement:
        slots = [HostSlot(host=name, node=self._sites[name].node) for name in names]
        geometry = read_geometry(self._model_dir, "auto", expert_slices=self.spec.expert_slices)
        return place(geometry, slots, num_replicas=self.spec.num_replicas)

    def spawn(self, name: str) -> HostProcess:
        """Start a life of a host; it holds nothing yet."""
        host = self._nursery.spawn(
            name,
            site=self._sites[name],
            model_dir=self.spec.model_dirs.get(name, self._model_dir),
            run_dir=self._run_dir,
            secret=SECRET,
            expert_slices=self.spec.expert_slices,
        )
        self._resources.callback(host.close)
        return host

    def start(self) -> "Cluster":
        """Start the attention workers."""
        self.epoch += 1
        for index in range(self.spec.num_workers):
            worker = self.start_worker(index)
            worker.publish(self.topology())
            engine = RemoteEngine(worker.serve(), secret=SECRET)
            self._resources.callback(engine.close)
            self.workers.append(worker)
            self.engines.append(engine)
        return self

    def start_worker(self, index: int) -> WorkerOnNode:
        """Start an attention worker that knows no topology yet."""
        config = WorkerConfig(
            worker=f"attention-{index}", role=Role.ATTENTION, model_dir=self._model_dir, dtype="auto", device="cpu",
            num_threads=1, run_dir=self._run_dir, secret=SECRET, cross_check_every=self.spec.cross_check_every,
            expert_slices=self.spec.expert_slices,
            options=EngineOptions(
                num_blocks=256, max_num_seqs=8, expert_timeout_s=self.spec.expert_timeout_s, debug_invariants=True
            ),
        )  # fmt: skip
        node = "elsewhere" if self.spec.worker_is_elsewhere or self.spec.worker_node else HERE.node
        worker = WorkerOnNode(config, Location(node=node, address="127.0.0.1"))
        worker.node = self.spec.worker_node
        self._resources.callback(worker.close)
        worker.load()
        return worker

    def topology(self) -> Topology:
        told = {
            name: replace(at, unix=self.detours[name], tcp=self.detours[name]) if name in self.detours else at
            for name, at in self.addresses.items()
        }
        return Topology(epoch=self.epoch, placement=self.placement, hosts=told)

    def respawn(self, *names: str) -> None:
        """Begin new lives of dead hosts, and tell the workers, as a controller does."""
        for name in names:
            self.hosts[name] = self.spawn(name)
        for name in names:
            self.addresses[name] = self.hosts[name].load(self.placement.held_by(name))
        self.publish()

    def publish(self) -> None:
        self.epoch += 1
        for worker in self.workers:
            worker.publish(self.topology())

    def load(self, cases: Sequence[EngineRequest], reference: Reference) -> Load:
        """Make the load that runs on all workers; it can be made once."""
        load = Load(self.engines, cases, reference, self._run_dir.with_suffix(".jsonl"))
        self._resources.callback(load.close)
        return load

    @property
    def stats(self) -> DispatchStats:
        """The counters of the first worker's dispatcher."""
        return self.workers[0]._follower.dispatcher.stats()

    @property
    def live(self) -> frozenset[str]:
        """Hosts that the first worker has a link to."""
        return frozenset(self.workers[0]._follower.dispatcher.links)

    @property
    def num_adopted(self) -> int:
        return sum(host.stats["adopted"] for host in self.hosts.values() if not host.process.is_dead)

    def wait_until_used(self, name: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the first worker sends rows to a host, and gets them back, from now on."""
        before = self.stats.rows_in[name]
        must(lambda: self.stats.rows_in[name] > before, lambda: f"{name} is used: {self.stats}", timeout_s=timeout_s)

    def detour(self, name: str) -> Proxy:
        """Put a proxy before a host; workers started later, or told a new topology, go through it."""
        proxy = self._resources.enter_context(Proxy(self.addresses[name].unix, seed=7))
        self.detours[name] = proxy.address
        return proxy
