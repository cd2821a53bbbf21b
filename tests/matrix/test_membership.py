"""What belongs to another life of a host, or to an earlier epoch, is not used; nobody waits for it either."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from llama4_dist.chaos.faults.processes import Kill
from llama4_dist.errors import PreconditionError
from tests.matrix.conftest import Cases
from tests.matrix.harness import Cluster

Make = Callable[..., Cluster]


def test_another_life_of_a_host_at_its_address_is_left_alone(make: Make, cases: Cases) -> None:
    cluster = make()
    address = cluster.addresses["expert-1"]
    cluster.addresses["expert-1"] = replace(address, incarnation=address.incarnation - 1)
    cluster.start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_ends(1)
    load.end()
    assert cluster.live == {"expert-0", "expert-2"}
    assert cluster.hosts["expert-1"].stats["frames_in"] == 0


def test_a_new_life_of_a_host_is_used_once_its_epoch_is_published(make: Make, cases: Cases) -> None:
    cluster = make().start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(8)
    with load.history.fault(Kill(cluster.hosts["expert-1"].pid)):
        cluster.respawn("expert-1")
    cluster.wait_until_used("expert-1")
    load.end(label="FX1 respawn")
    assert cluster.workers[0].status().epoch == 2


def test_an_epoch_that_is_not_newer_is_refused_and_changes_nothing(make: Make, cases: Cases) -> None:
    cluster = make().start()
    stale = cluster.topology()
    cluster.publish()
    with pytest.raises(PreconditionError) as caught:
        cluster.workers[0].publish(stale)
    assert caught.value.reason == "STALE_EPOCH"
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_ends(1)
    load.end()
    assert cluster.workers[0].status().epoch == 2
