"""Writes a schedule's cluster down as the controller is told it. Runs nothing."""

from pathlib import Path

from cluster.plan import ClusterPlan
from cluster.planning.placement import ExpertGeometry
from cluster.worker import Role, WorkerConfig
from tests.simulation.expert_process import EXPERT_BYTES
from tests.simulation.plan import Plan
from tests.simulation.tiny_model import NUM_EXPERTS, NUM_LAYERS, WIDTH

GEOMETRY = ExpertGeometry(
    moe_layers=tuple(range(NUM_LAYERS)), num_experts=NUM_EXPERTS, expert_width=WIDTH, expert_bytes=EXPERT_BYTES
)


def cluster_plan(plan: Plan) -> ClusterPlan:
    """Return the workers and experts of a schedule's cluster."""

    def configs(role: Role, count: int) -> tuple[WorkerConfig, ...]:
        return tuple(
            WorkerConfig(
                worker=f"{role}-{index}", role=role, model_dir=Path("simulated"), dtype="float32", device="cpu",
                num_threads=1, run_dir=Path("simulated"), secret=b"s" * 32, capacity_bytes=plan.capacity_bytes,
            )
            for index in range(count)
        )  # fmt: skip

    return ClusterPlan(
        model="tiny",
        geometry=GEOMETRY,
        experts=configs(Role.EXPERT, plan.num_hosts),
        attention=configs(Role.ATTENTION, plan.num_workers),
        num_replicas=plan.num_replicas,
        host_capacity_bytes=plan.capacity_bytes,
    )
