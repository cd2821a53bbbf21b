"""Two microbatches of a step are away at once; what happens to one host happens to both, and neither loses a row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.in_flight import InFlight
from llama4_dist.dispatch.links.inproc import Faults
from llama4_dist.dispatch.routing_table import RoutingTable
from llama4_dist.errors import UnavailableError
from tests.dispatch.fakes import NUM_EXPERTS, NUM_LAYERS, InprocCluster, direct, random_batch, whole

PAIRS = [(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def cluster_of(*hosts: str, num_replicas: int = 1, **options: Any) -> InprocCluster:
    """Experts in turn on the hosts, each on `num_replicas` of them."""
    names = [*hosts, *hosts]
    replicas = {(layer, expert): whole(*names[expert % len(hosts) :][:num_replicas]) for layer, expert in PAIRS}
    return InprocCluster(RoutingTable(epoch=1, replicas=replicas), **options)


def send_both(dispatcher: Dispatcher, step: int, layer: int = 0) -> list[tuple[InFlight, Batch]]:
    dispatcher.begin_step(step)
    batches = [random_batch(size, 1, seed=2 * step + index) for index, size in enumerate((24, 17))]
    return [(dispatcher.dispatch(layer, *batch, microbatch=index), batch) for index, batch in enumerate(batches)]


def check(dispatcher: Dispatcher, flights: list[tuple[InFlight, Batch]], layer: int = 0) -> None:
    for flight, batch in flights:
        assert torch.equal(dispatcher.combine(flight), direct(layer, *batch))
    assert not dispatcher._exchange.active


@pytest.mark.parametrize("hosts", [("a",), ("a", "b", "c")])
@pytest.mark.parametrize("turn", [1, -1], ids=["in order", "the other way round"])
def test_each_gets_its_own_rows(hosts: tuple[str, ...], turn: int) -> None:
    dispatcher = cluster_of(*hosts).dispatcher()
    for step in range(8):
        check(dispatcher, send_both(dispatcher, step)[::turn])


def lose(cluster: InprocCluster) -> None:
    cluster.ends["worker-0", "a"].abort()


def slow_down(cluster: InprocCluster) -> None:
    cluster.ends["worker-0", "a"]._faults = Faults(delay=1.0, delay_s=0.4)


@pytest.mark.parametrize("blow", [lose, slow_down])
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_what_a_host_owes_to_both_is_asked_of_others(blow: Callable[[InprocCluster], None], num_replicas: int) -> None:
    """With one replica a lost host's experts are adopted, and a slow one is waited for."""
    cluster = cluster_of("a", "b", num_replicas=num_replicas, room=len(PAIRS))
    dispatcher = cluster.dispatcher()
    check(dispatcher, send_both(dispatcher, 0))
    flights = send_both(dispatcher, 1)
    blow(cluster)
    check(dispatcher, flights)
    stats = dispatcher.stats()
    assert sum(stats.lost_hosts.values()) == (blow is lose)
    assert (stats.resent_rows > 0) == (blow is lose or num_replicas == 2)
    check(dispatcher, send_both(dispatcher, 3))


def test_one_that_cannot_be_answered_does_not_spoil_the_other() -> None:
    cluster = cluster_of("a", "b")
    dispatcher = cluster.dispatcher()
    dispatcher.begin_step(0)
    x_TD, experts_TK, scores_TK = random_batch(16, 1)
    of_a, of_b = experts_TK // 2 * 2 % NUM_EXPERTS, torch.ones_like(experts_TK)
    lost = dispatcher.dispatch(0, x_TD, of_a, scores_TK, microbatch=0)
    kept = dispatcher.dispatch(0, x_TD, of_b, scores_TK, microbatch=1)
    cluster.ends["worker-0", "a"].abort()
    with pytest.raises(UnavailableError):
        dispatcher.combine(lost)
    assert torch.equal(dispatcher.combine(kept), direct(0, x_TD, of_b, scores_TK))


def test_one_frame_for_each_host_layer_and_microbatch() -> None:
    cluster = cluster_of("a", "b", "c")
    dispatcher = cluster.dispatcher()
    num_steps = 3
    for step in range(num_steps):
        for layer in range(NUM_LAYERS):
            flights = send_both(dispatcher, step, layer)
            hosts = [{"abc"[expert % 3] for expert in batch[1].flatten().tolist()} for _, batch in flights]
            before = dispatcher.stats().frames_out.total()
            check(dispatcher, flights, layer)
            assert all(found == {"a", "b", "c"} for found in hosts), "the batches reach every host"
            assert dispatcher.stats().frames_out.total() == before, "frames leave with dispatch"
    assert dispatcher.stats().frames_out == dict.fromkeys("abc", 2 * num_steps * NUM_LAYERS)
