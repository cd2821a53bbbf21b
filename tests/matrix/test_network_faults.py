"""FX12-16: the way between an attention worker and its hosts breaks, in packets and in bytes; links come back alone."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from llama4_dist.chaos.faults.fault import Fault, must
from tests.faults.fault import offered
from tests.faults.namespaces import Node
from tests.faults.network import LinkDown, Network, Partition
from tests.faults.proxy import Proxy
from tests.faults.proxy_faults import HalfClose, Reset, Toxic
from tests.faults.relay import RelayNetwork, Weather
from tests.faults.relay_faults import BadWeather
from tests.faults.toxics import NONE, Direction, Toxics
from tests.matrix.conftest import Cases
from tests.matrix.harness import Cluster
from tests.matrix.hosts import Site

MAX_STALL_S = 2.0  # `ip` and the relay take processor time too
WARM = 8
NUM_FLAPS = 50
ESTABLISHED, CLOSING, NOTHING = "01", "04", "00000000:"
Make = Callable[..., Cluster]


@pytest.fixture
def network(resources: ExitStack) -> Network:
    return resources.enter_context(offered(Network, 3))  # there until the cluster is gone


@pytest.fixture
def relay(resources: ExitStack) -> RelayNetwork:
    return resources.enter_context(offered(RelayNetwork, 3, seed=5))


def on_nodes(make: Make, network: Network | RelayNetwork) -> Cluster:
    """The worker on the first node, a host with every expert on each of the others."""
    worker, *others = network.nodes
    sites = [Site.on(node) for node in others]
    return make(num_hosts=len(others), sites=sites, worker_node=worker).start()


@pytest.mark.parametrize("cut", ["to the host", "to the worker", "both"])
def test_a_partition_costs_a_stall_and_heals_without_a_restart(
    make: Make, cases: Cases, network: Network, cut: str
) -> None:
    cluster = on_nodes(make, network)
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    worker, _, other = network.nodes
    source, destination = (other, worker) if cut == "to the worker" else (worker, other)
    fault = Partition(network, source, destination, one_way=cut != "both")
    with load.history.fault(fault, phase=cut):
        must(lambda: "expert-1" not in cluster.live, "the host behind the cut is given up", timeout_s=10.0)
        load.wait_for_tokens(WARM)
    cluster.wait_until_used("expert-1")
    assert load.end(label=f"FX12 {cut}").added_stall.max_s < MAX_STALL_S
    assert set(cluster.stats.lost_hosts) == {"REPLY_TIMEOUT"}


def test_a_host_that_never_hears_of_the_end_of_its_link_is_joined_again(
    make: Make, cases: Cases, network: Network
) -> None:
    cluster = on_nodes(make, network)
    worker, _, other = network.nodes
    # In a long partition the kernel gives the last packet of a closed connection up; here it does so at once.
    worker.inside(lambda: Path("/proc/sys/net/ipv4/tcp_orphan_retries").write_text("1"))
    load = cluster.load(cases.requests, cases.reference)
    must(lambda: all(one[4].startswith(NOTHING) for one in connections(other, ESTABLISHED)), "the host has all acked")
    with load.history.fault(Partition(network, worker, other)):
        load.start()
        must(lambda: "expert-1" not in cluster.live, "the host behind the cut is given up", timeout_s=10.0)
        must(lambda: connections(worker, CLOSING) != [], "the worker's kernel tells of the end")
        must(lambda: not connections(worker, CLOSING), "the worker's kernel has given it up", timeout_s=20.0)
    cluster.wait_until_used("expert-1")
    load.end(label="FX12 half open")


def connections(node: Node, state: str) -> list[list[str]]:
    """List a node's connections in a state (tcp_states.h), as in /proc/net/tcp: the fifth field is what is unsent."""
    text = node.inside(lambda: Path("/proc/thread-self/net/tcp").read_text())
    return [fields for line in text.splitlines()[1:] if (fields := line.split())[3] == state]


def test_a_flapping_cable_loses_no_token_and_leaves_nothing_stuck(make: Make, cases: Cases, network: Network) -> None:
    cluster = on_nodes(make, network)
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    with load.history.fault(LinkDown(network, network.nodes[1], flaps=NUM_FLAPS)):
        must(lambda: "expert-0" not in cluster.live, "the host without a cable is given up", timeout_s=10.0)
        load.wait_for_tokens(WARM)
    cluster.wait_until_used("expert-0")
    assert load.end(label="FX13").added_stall.max_s < MAX_STALL_S
    assert cluster.live == {"expert-0", "expert-1"}


@pytest.mark.parametrize(("delay_s", "jitter_s", "num_slow"), [(0.005, 0.002, 2), (0.05, 0.02, 2), (0.2, 0.05, 1)])
def test_delay_makes_tokens_slower_and_no_host_lost(
    make: Make, cases: Cases, relay: RelayNetwork, delay_s: float, jitter_s: float, num_slow: int
) -> None:
    cluster = on_nodes(make, relay)
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    worker, *others = relay.nodes
    weather = Weather(delay_s=delay_s, jitter_s=jitter_s)
    with ExitStack() as stack:
        for other in others[:num_slow]:
            for way in ((worker, other), (other, worker)):
                stack.enter_context(load.history.fault(BadWeather(relay, *way, weather)))
        load.wait_for_tokens(3)
    load.end(label=f"FX14 {delay_s * 1e3:.0f} ms")
    assert not cluster.stats.lost_hosts


def test_lost_doubled_and_overtaking_packets_change_no_token(make: Make, cases: Cases, relay: RelayNetwork) -> None:
    cluster = on_nodes(make, relay)
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    worker, other, _ = relay.nodes
    weather = Weather(loss=0.05, duplicate=0.1, reorder=0.1, delay_s=0.002)
    with (
        load.history.fault(BadWeather(relay, worker, other, weather)),
        load.history.fault(BadWeather(relay, other, worker, weather)),
    ):
        load.wait_for_tokens(WARM)
    cluster.wait_until_used("expert-0")
    assert load.end(label="FX15 packets").added_stall.max_s < MAX_STALL_S


def behind_proxy(make: Make) -> tuple[Cluster, Proxy]:
    """Two hosts with every expert each, the second behind a proxy."""
    cluster = make(num_hosts=2)
    proxy = cluster.detour("expert-1")
    return cluster.start(), proxy


@pytest.mark.parametrize("direction", list(Direction))
def test_flipped_bits_close_the_link_and_are_never_computed_with(
    make: Make, cases: Cases, direction: Direction
) -> None:
    cluster, proxy = behind_proxy(make)
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    with load.history.fault(Toxic(proxy, direction, Toxics(corrupt_every=1501)), phase=direction):
        load.wait_for_tokens(WARM)
    cluster.wait_until_used("expert-1")
    assert load.end(label=f"FX15 bytes {direction}").added_stall.max_s < MAX_STALL_S
    closed = cluster.hosts["expert-1"].stats["closed_links"]
    seen = closed if direction is Direction.TO_SERVER else cluster.stats.lost_hosts
    assert "CHECKSUM_WRONG" in seen, seen


@pytest.mark.parametrize("name", ["reset", "half_close to_server", "half_close to_client"])
def test_a_broken_connection_is_made_anew_and_what_it_owed_asked_again(make: Make, cases: Cases, name: str) -> None:
    cluster, proxy = behind_proxy(make)
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    fault: Fault = Reset(proxy) if name == "reset" else HalfClose(proxy, Direction(name.split()[1]))
    with load.history.fault(fault, name=name):
        cluster.wait_until_used("expert-1")
    assert load.end(label=f"FX16 {name}").added_stall.max_s < MAX_STALL_S
    assert cluster.stats.lost_hosts.total() >= 1


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("name", ["unread", "dribble"])
def test_a_connection_that_stands_or_crawls_holds_up_no_other_host(
    make: Make, cases: Cases, direction: Direction, name: str
) -> None:
    toxics = Toxics(blackhole=True) if name == "unread" else Toxics(slice_bytes=1, bytes_per_s=400.0)
    cluster, proxy = behind_proxy(make)
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    with load.history.fault(Toxic(proxy, direction, toxics)):
        load.wait_for_tokens(WARM)
    cluster.wait_until_used("expert-1")
    assert load.end(label=f"FX16 {name} {direction}").added_stall.max_s < MAX_STALL_S
    assert cluster.stats.hedged_rows > 0


@pytest.mark.parametrize("direction", list(Direction))
def test_a_frame_may_be_cut_anywhere(make: Make, cases: Cases, direction: Direction) -> None:
    cluster, proxy = behind_proxy(make)
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    places = [*range(0, 48, 7), *range(48, 400, 31)]
    for place in places:
        num_cut, num_lost = proxy.counters(direction).num_cut, cluster.stats.lost_hosts.total()
        proxy.set(direction, Toxics(drop_after=place))
        must(partial(lost_more_than, cluster, num_lost), f"a frame cut at byte {place} is noticed", timeout_s=5.0)
        must(partial(cut_more_than, proxy, direction, num_cut), f"it was byte {place} that was cut", timeout_s=5.0)
        proxy.set(direction, NONE)
        must(lambda: "expert-1" in cluster.live, "the link is up again", timeout_s=5.0)
    cluster.wait_until_used("expert-1")
    load.end(label=f"FX16 cut {direction} at {len(places)} places")


def cut_more_than(proxy: Proxy, direction: Direction, count: int) -> bool:
    """The proxy counts a cut after it has made it, when the worker may have seen it already."""
    return proxy.counters(direction).num_cut > count


def lost_more_than(cluster: Cluster, count: int) -> bool:
    return cluster.stats.lost_hosts.total() > count
