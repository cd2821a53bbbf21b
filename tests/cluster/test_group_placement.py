"""Where members of attention groups go: the ranks of a stage to one node, leaders anywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.driver.nodes import Node
from cluster.driver.spawn import Home, RaySpawner
from cluster.driver.worker_bundle import stage_of, worker_bundle
from cluster.plan import stages_of
from cluster.worker import Role, WorkerConfig
from llama4_dist.partition import Partition

LEADER = WorkerConfig(
    worker="attention-0", role=Role.ATTENTION, model_dir=Path("m"), dtype="auto", device="cuda", num_threads=1,
    run_dir=Path("r"), secret=b"s" * 32, partition=Partition(num_stages=2, num_ranks=2),
)  # fmt: skip
MEMBERS = stages_of(LEADER, num_threads=4)
OFFERS = {"CPU": 16.0, "GPU": 2.0, "llama4_attention": 8.0}
LABELS = {Role.ATTENTION: {"gpu": "large"}}


class Placed(RaySpawner):
    """A spawner that notes where it would put a worker, on nodes that a test describes."""

    def __init__(self, gpus: Sequence[int]) -> None:
        super().__init__(run_id="run", labels=LABELS)
        self.gpus = gpus

    def _nodes(self, role: Role) -> list[Node]:
        nodes = []
        for number, gpus in enumerate(self.gpus):
            here = [home for home in self._homes.values() if home.node == f"node-{number}"]
            held = {name: sum(home.bundle.get(name, 0.0) for home in here) for name in OFFERS}
            nodes.append(
                Node(
                    node=f"node-{number}",
                    offers=OFFERS | {"GPU": gpus},
                    labels={"gpu": "large"},
                    held=held,
                    num_of_role=sum(home.role is role for home in here),
                )
            )
        return nodes

    def put(self, config: WorkerConfig) -> str | None:
        bundle = worker_bundle(config, OFFERS)
        node = self._choose(config, bundle, self._demanded(config))
        group: Any = None
        self._homes[config.worker] = Home(config.role, stage_of(config), bundle, node, group, None)
        return node


def test_the_ranks_of_a_stage_go_to_one_node_and_stages_to_different_ones() -> None:
    spawner = Placed([2, 2])
    assert [spawner.put(member) for member in MEMBERS] == ["node-0", "node-0", "node-1", "node-1"]


def test_a_stage_goes_where_there_is_room_for_all_its_ranks() -> None:
    spawner = Placed([1, 2, 2])
    assert [spawner.put(member) for member in MEMBERS] == ["node-1", "node-1", "node-2", "node-2"]


def test_a_member_that_comes_back_goes_to_the_other_ranks_of_its_stage() -> None:
    spawner = Placed([2, 2])
    for member in MEMBERS:
        spawner.put(member)
    del spawner._homes[MEMBERS[3].worker]
    assert spawner.put(MEMBERS[3]) == "node-1"


def test_members_hold_what_attention_workers_do_and_the_leader_little() -> None:
    assert worker_bundle(MEMBERS[0], OFFERS) == {"CPU": 4, "GPU": 1, "llama4_attention": 1}
    assert worker_bundle(LEADER, OFFERS, demand_role=True) == {"CPU": 0.1}
    spawner = Placed([2])
    assert spawner._demanded(MEMBERS[0]) == {"gpu": "large"}
    assert spawner._demanded(LEADER) == {}


@pytest.mark.parametrize("member", MEMBERS, ids=lambda one: one.worker)
def test_names_and_places_agree(member: WorkerConfig) -> None:
    assert member.worker == f"attention-0-stage-{member.stage}-rank-{member.rank}"
    assert (member.group, member.leads, member.role) == ("attention-0", False, Role.STAGE)
