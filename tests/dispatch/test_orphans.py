"""What a dead host owed is asked again when its end is seen; nobody waits for a deadline to pass."""

import pytest
import torch

from llama4_dist.dispatch.routing_table import RoutingTable
from tests.dispatch.fakes import NUM_EXPERTS, NUM_LAYERS, InprocCluster, direct, random_batch, whole

PAIRS = [(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]


@pytest.mark.parametrize("hosts", [("a", "b"), ("a",)], ids=["a copy", "adoption"])
def test_orphans_are_sent_again_without_the_clock_moving(hosts: tuple[str, ...]) -> None:
    table = {(layer, expert): whole(*(hosts if expert % 2 else ("b",))) for layer, expert in PAIRS}
    cluster = InprocCluster(RoutingTable(epoch=1, replicas=table), room=len(PAIRS))
    dispatcher = cluster.dispatcher()
    batch = random_batch(32, 1)
    begun_s = cluster.clock.now
    in_flight = dispatcher.dispatch(0, *batch)
    cluster.ends["worker-0", "a"].abort()
    assert torch.equal(dispatcher.combine(in_flight), direct(0, *batch))
    assert cluster.clock.now == begun_s
    assert dispatcher.stats().hedged_rows == 0
    assert dispatcher.stats().resent_rows > 0
