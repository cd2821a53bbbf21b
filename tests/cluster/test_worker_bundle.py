"""What a worker holds of Ray, by role, device and what the cluster offers."""

from pathlib import Path

import pytest

from cluster.driver.worker_bundle import worker_bundle
from cluster.worker import Role, WorkerConfig


def config(role: Role, device: str = "cpu") -> WorkerConfig:
    return WorkerConfig(
        worker="w",
        role=role,
        model_dir=Path("/models/m"),
        dtype="float32",
        device=device,
        num_threads=3,
        run_dir=Path("/tmp/run"),
        secret=b"0" * 32,
    )


@pytest.mark.parametrize("role", [Role.EXPERT, Role.ATTENTION])
def test_a_roles_resource_is_held_where_the_cluster_offers_it(role: Role) -> None:
    assert worker_bundle(config(role), {"CPU": 8}) == {"CPU": 3}
    assert worker_bundle(config(role, "cuda"), {f"llama4_{role}": 4}) == {"CPU": 3, "GPU": 1, f"llama4_{role}": 1}


def test_a_role_that_is_demanded_is_waited_for_before_a_node_offers_it() -> None:
    assert worker_bundle(config(Role.EXPERT), {"CPU": 8}, demand_role=True) == {"CPU": 3, "llama4_expert": 1}
