"""When an attention group is formed, and as which formation: the decision on records, the controller over fakes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.control_plane.formation import due_formation, formation_of
from cluster.plan import Group
from cluster.worker import Role, StageAddress, WorkerStatus
from cluster.worker import State as WorkerState
from llama4_dist.errors import HandshakeError, UnavailableError
from llama4_dist.partition import Partition
from tests.cluster.fake_workers import FakeAttention
from tests.cluster.fakes import FakeSpawner, fail
from tests.cluster.small_clusters import SmallCluster, hasten
from tests.waiting import wait_until

Make = Callable[..., SmallCluster]
PAIR = Group(leader="attention-0", members=("attention-0-stage-0-rank-0", "attention-0-stage-1-rank-0"))
MEMBER = "attention-0-stage-1-rank-0"
WIDE = Partition(num_stages=2, num_ranks=2)


def statuses(*formations: int, last: int = 0) -> dict[str, WorkerStatus]:
    return {
        name: WorkerStatus(
            worker=name, role=Role.STAGE, state=WorkerState.READY, formation=number, last_formation=max(number, last)
        )
        for name, number in zip(PAIR.all, formations, strict=False)
    }


@pytest.mark.parametrize(
    ("said", "last", "due"),
    [
        (statuses(3, 3, 3), 3, None),  # formed
        (statuses(3, 3), 3, None),  # one does not answer
        (statuses(0, 0, 0), 0, 1),  # the first time
        (statuses(3, 3, 0), 3, 4),  # one is new
        (statuses(3, 0, 0, last=3), 3, 4),  # a link was lost
        (statuses(2, 3, 3), 3, 4),  # one missed it
        (statuses(0, 7, 7), 0, 8),  # the controller is new too
        (statuses(0, 0, 0, last=5), 9, 10),  # what was tried last reached nobody
    ],
)
def test_a_formation_is_due_when_all_answer_and_are_not_in_the_same(
    said: dict[str, WorkerStatus], last: int, due: int | None
) -> None:
    assert due_formation(PAIR, said, last=last) == due


def test_pages_are_those_the_leader_counts_or_those_of_the_member_with_least_room() -> None:
    def addresses(leader: int, *members: int) -> dict[str, StageAddress]:
        rooms = dict(zip(PAIR.all, (leader, *members), strict=True))
        return {
            name: StageAddress(worker=name, node="n", address="a", unix="u", tcp="t", num_pages=room)
            for name, room in rooms.items()
        }

    first = formation_of(PAIR, 1, addresses(0, 30, 20))
    assert (first.num_pages, [one.worker for one in first.members]) == (20, list(PAIR.members))
    assert formation_of(PAIR, 2, addresses(20, 30, 40)).num_pages == 20


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    hasten(monkeypatch)
    made: list[SmallCluster] = []

    def make(*arguments: int, **options: Any) -> SmallCluster:
        made.append(SmallCluster(*arguments, **({"partition": WIDE} | options)))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


def formation(cluster: SmallCluster, worker: str = "attention-0") -> int:
    one = cluster.spawner.workers[worker]
    assert isinstance(one, FakeAttention)
    return one.number


def test_a_new_cluster_serves_with_groups_that_are_formed(make: Make) -> None:
    cluster = make(2, 2)
    cluster.rest()
    assert [formation(cluster, one.leader) for one in cluster.plan.groups] == [1, 1]
    assert len(cluster.spawner.workers) == 2 + 2 * 5
    assert cluster.engines.keys() == {"attention-0", "attention-1"}


@pytest.mark.parametrize("victim", ["attention-0", MEMBER])
def test_whoever_dies_is_replaced_and_the_group_formed_again(make: Make, victim: str) -> None:
    cluster = make(2, 2)
    cluster.rest()
    others = {name: one for name, one in cluster.spawner.workers.items() if name != victim}
    cluster.spawner.die(victim)
    wait_until(lambda: formation(cluster) == 2)
    cluster.rest()
    assert formation(cluster, "attention-1") == 1, "the other group has nothing to do with it"
    assert {name: cluster.spawner.workers[name] for name in others} == others


def test_all_of_a_group_may_die_at_once(make: Make) -> None:
    cluster = make(2, 1)
    cluster.rest()
    for name in cluster.plan.groups[0].all:
        cluster.spawner.die(name)
    wait_until(lambda: not cluster.spawner.dead)
    cluster.rest()


def test_a_group_that_cannot_be_formed_is_tried_again(make: Make) -> None:
    cluster = make(2, 1)
    cluster.rest()
    cluster.spawner.faults[f"{MEMBER}.form"] = fail(UnavailableError("a neighbour is late", reason="WORKER_LOST"))
    cluster.spawner.die("attention-0-stage-0-rank-0")
    wait_until(lambda: cluster.spawner.calls.count((MEMBER, "form")) >= 4)
    assert formation(cluster) == 0
    cluster.spawner.faults.clear()
    cluster.rest()
    assert formation(cluster) >= 4, "a number was given twice"


def test_a_member_that_does_not_leave_its_group_is_replaced(make: Make) -> None:
    cluster = make(2, 1)
    cluster.rest()
    stuck = cluster.spawner.workers[MEMBER]
    cluster.spawner.faults[f"{MEMBER}.prepare"] = fail(UnavailableError("it gathers", reason="MEMBER_STUCK"))
    cluster.spawner.die("attention-0-stage-0-rank-0")
    wait_until(lambda: cluster.spawner.workers[MEMBER] is not stuck)
    cluster.spawner.faults.clear()
    cluster.rest()


def test_a_new_controller_leaves_a_group_that_is_formed_alone(make: Make) -> None:
    cluster = make(2, 1)
    cluster.rest()
    before = dict(cluster.spawner.workers)
    cluster.spawner.die("controller")
    wait_until(lambda: len(cluster.spawner.controllers) == 2)
    cluster.rest()
    assert formation(cluster) == 1
    assert cluster.spawner.workers == before


def test_a_new_controller_forms_a_group_that_lost_a_member_with_a_number_of_its_own(make: Make) -> None:
    cluster = make(2, 1)
    cluster.rest()
    cluster.spawner.die(MEMBER)
    wait_until(lambda: formation(cluster) == 2)
    cluster.rest()
    cluster.spawner.die("controller")
    cluster.spawner.die(MEMBER)
    wait_until(lambda: len(cluster.spawner.controllers) == 2)
    cluster.rest()
    assert formation(cluster) > 2


def test_members_follow_a_change_of_the_pool(make: Make) -> None:
    cluster = make(2, 1)
    cluster.rest()
    cluster.scale_well(3)
    cluster.scale_well(1)
    assert formation(cluster) == 1


def test_members_that_do_not_fit_each_other_end_the_start(make: Make) -> None:
    error = HandshakeError("the peer's arithmetic is 'torch-cpu', ours 'native'", reason="ARITHMETIC_DIFFERS")
    spawner = FakeSpawner()
    spawner.faults[f"{MEMBER}.form"] = fail(error)
    with pytest.raises(HandshakeError, match="arithmetic"):
        make(2, 1, spawner=spawner)
