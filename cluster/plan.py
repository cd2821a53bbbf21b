"""What a cluster is started from: its workers, the experts they share out, and how many copies. Plain records."""

from dataclasses import dataclass, replace

from cluster.planning.autoscale import AutoscalePolicy
from cluster.planning.placement import ExpertGeometry
from cluster.worker import Role, WorkerConfig
from llama4_dist.errors import ConfigError
from llama4_dist.telemetry.settings import DEFAULT, Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The processes of an attention group by name; members stand in the order of `Partition.places`."""

    leader: str
    members: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (self.leader, *self.members)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """`num_replicas` copies of every expert are kept where memory allows; `host_capacity_bytes` None = no limit."""

    model: str
    geometry: ExpertGeometry
    experts: tuple[WorkerConfig, ...]
    attention: tuple[WorkerConfig, ...]
    stages: tuple[WorkerConfig, ...] = ()  # the members of all attention groups
    num_replicas: int = 2
    host_capacity_bytes: int | None = None
    autoscale: AutoscalePolicy | None = None  # None = the number of hosts is the operator's
    telemetry: Telemetry = DEFAULT  # the controller's

    def __post_init__(self) -> None:
        if not self.experts or not self.attention:
            raise ConfigError(
                f"num_expert_hosts={len(self.experts)}, num_attention_workers={len(self.attention)}: "
                "a cluster needs one of each"
            )
        if self.num_replicas < 1:
            raise ConfigError(f"num_replicas={self.num_replicas} must be at least 1")

    def config_of(self, worker: str, role: Role) -> WorkerConfig:
        """Return what a worker is told that is started later; an expert host what the first was, but for the id."""
        if role is Role.EXPERT:
            return replace(self.experts[0], worker=worker)
        return next(one for one in (*self.attention, *self.stages) if one.worker == worker)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The attention groups; none where the model is whole."""
        return tuple(
            Group(
                leader=one.worker, members=tuple(member.worker for member in self.stages if member.group == one.worker)
            )
            for one in self.attention
            if one.leads
        )


def stages_of(leader: WorkerConfig, *, num_threads: int) -> tuple[WorkerConfig, ...]:
    """Return what the members of a leader's group are told; none where the leader computes all layers itself."""
    if not leader.leads:
        return ()
    return tuple(
        replace(
            leader,
            worker=f"{leader.worker}-stage-{stage}-rank-{rank}",
            role=Role.STAGE,
            num_threads=num_threads,
            group=leader.worker,
            stage=stage,
            rank=rank,
        )
        for stage, rank in leader.partition.places
    )
