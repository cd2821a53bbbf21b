"""Several Ray nodes on one machine: experts go where the resource or label is, spread over nodes, reached by TCP."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.driver.launch import NAMESPACE
from cluster.ray_engine import RayEngine
from cluster.worker import Role
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import UnavailableError
from tests.cluster.running import Collector, reference, some_requests

pytestmark = pytest.mark.ray

OPTIONS = EngineOptions(num_blocks=128, max_num_seqs=8)
STORE = 80 * 1024 * 1024


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[dict[str, str]]:
    """Node ids by what the node is for."""
    cluster = Cluster()
    try:
        common: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE, "num_cpus": 8}
        quiet = {"prestart_worker_first_driver": False}
        cluster.add_node(**common, resources={"llama4_attention": 1}, _system_config=quiet)
        cluster.add_node(**common, resources={"llama4_expert": 2}, labels={"pool": "left"})
        cluster.add_node(**common, resources={"llama4_expert": 2}, labels={"pool": "right"})
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        cluster.wait_for_nodes()
        yield {node["Labels"].get("pool", "head"): node["NodeID"] for node in ray.nodes()}
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_experts_are_spread_over_the_nodes_that_offer_them(model_dir: Path, three_nodes: dict[str, str]) -> None:
    requests, collector = some_requests("n"), Collector()
    engine = RayEngine(model_dir, num_expert_hosts=2, num_replicas=2, options=OPTIONS)
    try:
        node_of = {worker.worker: worker.node for worker in engine.status()}
        assert node_of["attention-0"] == three_nodes["head"]
        assert {node_of["expert-0"], node_of["expert-1"]} == {three_nodes["left"], three_nodes["right"]}
        engine.start(collector.collect)
        assert collector.run(engine, requests) == reference(model_dir, requests)
    finally:
        engine.close()


def test_labels_hold_experts_on_one_node_and_impossible_ones_are_named(
    model_dir: Path, three_nodes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {Role.EXPERT: {"pool": "right"}}
    engine = RayEngine(model_dir, num_expert_hosts=2, num_replicas=1, options=OPTIONS, labels=labels)
    try:
        nodes = {worker.node for worker in engine.status() if worker.role is Role.EXPERT}
        assert nodes == {three_nodes["right"]}
    finally:
        engine.close()
    monkeypatch.setattr("cluster.driver.spawn.PLACEMENT_TIMEOUT_S", 1.0)
    with pytest.raises(UnavailableError, match=r"pool.*nowhere") as caught:
        RayEngine(model_dir, num_expert_hosts=1, options=OPTIONS, labels={Role.EXPERT: {"pool": "nowhere"}})
    assert caught.value.reason == "INSUFFICIENT_CAPACITY"
