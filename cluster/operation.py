"""A change of the cluster as its operator sees it: what was asked, how far it is, how it ended. Plain records."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.planning.placement import Pair
from cluster.worker import WorkerStatus


class Kind(StrEnum):
    """What an operation changes."""

    SCALE = "scale"
    REBALANCE = "rebalance"
    DRAIN = "drain"
    REPAIR = "repair"  # the controller's own: bring lost copies back


class Phase(StrEnum):
    """Where an operation is. The last three are final."""

    PLANNING = "planning"
    PROVISIONING = "provisioning"  # new processes start
    LOADING = "loading"  # hosts map what they will hold
    VERIFYING = "verifying"  # weight hashes and golden rows against a replica
    COMMITTING = "committing"  # each attention worker switches at its own step boundary
    DRAINING = "draining"  # what is in flight to the old places ends; then they free it
    ROLLING_BACK = "rolling_back"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def final(self) -> bool:
        return self in (Phase.DONE, Phase.CANCELLED, Phase.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeOptions:
    """How a change is carried out.

    `request_id` makes it idempotent: the same id and change again returns the first operation. `validate_only` plans
    and changes nothing; the operation it returns is not kept. `drain_timeout_s` bounds the wait for rows in flight.
    """

    request_id: str = ""
    validate_only: bool = False
    drain_timeout_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a plan would do: hosts that come and go, (layer, expert) copies that move, and what that costs and brings.

    Balance is the mean over layers of (load of the busiest host / mean load); 1.0 is even.
    """

    hosts_before: int
    hosts_after: int
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    freed_nodes: tuple[str, ...] = ()  # no host of the pool is left there: an autoscaler may take them away
    num_moves: int = 0
    num_bytes: int = 0
    balance_before: float = 1.0
    balance_after: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One change, now or when it ended. Times are of the Unix clock; for `paused_s` seconds no step could run.

    `error_reason` and `error_message` are set where it failed. `epoch` is the last epoch it published, 0 if none.
    """

    name: str  # "operations/7"
    kind: Kind
    phase: Phase
    request_id: str = ""
    change: Change | None = None  # known after planning
    started_s: float = 0.0
    ended_s: float | None = None
    hosts_ready: int = 0
    moves_done: int = 0
    bytes_done: int = 0
    paused_s: float = 0.0
    epoch: int = 0
    warnings: tuple[str, ...] = ()
    error_reason: str = ""
    error_message: str = ""

    @property
    def progress(self) -> float:
        """Share of the work that is done, 0 to 1."""
        if self.phase is Phase.DONE:
            return 1.0
        total = self.change.num_bytes if self.change is not None else 0
        return min(0.99, self.bytes_done / total) if total else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """The cluster now. `workers` begins with the controller; `operation` names the change under way, "" if none.

    Every expert is cut into `num_slices`.
    """

    model: str
    epoch: int
    num_replicas: int
    workers: tuple[WorkerStatus, ...]
    operation: str = ""
    num_slices: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementView:
    """Who holds what in one epoch: each (layer, unit)'s hosts, the preferred one first.

    `expert_bytes` are those of one whole expert, `slice_bytes` those of the largest of its `num_slices`.
    """

    epoch: int
    num_experts: int
    moe_layers: tuple[int, ...]
    expert_bytes: int
    hosts_of: Mapping[Pair, tuple[str, ...]]
    num_slices: int = 1
    slice_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLoad:
    """One expert host's counters since it began; rates are differences of two of these over `at_s` (monotonic).

    With a bound on memory `num_resident` of the units held are in it and `num_mapped` are not; hits and misses count
    units whose rows came.
    """

    host: str
    incarnation: int
    at_s: float
    rows: Mapping[Pair, int] = field(default_factory=dict)
    compute_s: float = 0.0
    queue_depth: int = 0
    bytes_held: int = 0
    num_resident: int = 0
    num_mapped: int = 0
    residency_hits: int = 0
    residency_misses: int = 0
