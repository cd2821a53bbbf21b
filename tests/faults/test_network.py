"""Faults of the network hold, heal and are refused when they fall on another way."""

import socket
from collections.abc import Iterator

import pytest

from tests.faults.fault import FaultNotVerified, offered
from tests.faults.namespaces import Node, ip
from tests.faults.network import LinkDown, Network, Partition
from tests.faults.probe import probe, reaches
from tests.faults.relay import RelayNetwork, Weather
from tests.faults.relay_faults import BadWeather


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with offered(Network, 3) as made:
        yield made


@pytest.fixture(scope="module")
def relayed() -> Iterator[RelayNetwork]:
    with offered(RelayNetwork, 2, seed=3) as made:
        yield made


def tcp_pair(source: Node, destination: Node) -> tuple[socket.socket, socket.socket]:
    with destination.inside(lambda: socket.create_server((destination.address, 0))) as listener:
        client = source.inside(lambda: socket.create_connection(listener.getsockname(), 5))
        server, _ = listener.accept()
    server.settimeout(5)
    return client, server


def test_every_node_reaches_every_other(network: Network) -> None:
    assert all(reaches(a, b) for a in network.nodes for b in network.nodes if a is not b)


def test_a_partition_cuts_two_nodes_and_no_third(network: Network) -> None:
    a, b, c = network.nodes
    with Partition(network, a, b):
        assert not reaches(a, b)
        assert not reaches(b, a)
        assert all(reaches(*way) for way in ((a, c), (c, a), (b, c), (c, b)))
    assert reaches(a, b)


def test_a_one_way_partition_lets_the_other_way_through(network: Network) -> None:
    a, b, _ = network.nodes
    with Partition(network, a, b, one_way=True):
        assert not reaches(a, b)
        assert reaches(b, a)


def test_a_connection_outlives_a_partition_and_delivers_late(network: Network) -> None:
    a, b, _ = network.nodes
    client, server = tcp_pair(a, b)
    with client, server:
        with Partition(network, a, b):
            client.sendall(b"late")
            server.settimeout(0.1)
            with pytest.raises(TimeoutError):
                server.recv(4)
        server.settimeout(10)
        assert server.recv(4) == b"late"


def test_a_partition_of_the_wrong_way_or_too_much_is_noticed(network: Network) -> None:
    a, b, c = network.nodes
    for aim, match in (((b, a), "still reaches"), ((a, c), "still reaches")):
        with pytest.raises(FaultNotVerified, match=match), Partition(network, a, b, one_way=True, aim=aim):
            pass
    one_way, other_way = Partition(network, a, b, one_way=True), Partition(network, b, a, one_way=True)
    with other_way:
        one_way.inject()
        with pytest.raises(FaultNotVerified, match="not so"):
            one_way.verify()
        one_way.heal()
    assert reaches(a, b)


def test_a_pulled_cable_is_seen_and_plugged_again(network: Network) -> None:
    a, b, c = network.nodes
    with LinkDown(network, b):
        assert not reaches(a, b)
        assert reaches(a, c)


def test_a_flapping_cable_changes_its_carrier_as_often_as_told(network: Network) -> None:
    with LinkDown(network, network.nodes[0], flaps=20):
        pass


def test_pulling_the_wrong_cable_is_noticed(network: Network) -> None:
    _, b, c = network.nodes
    with pytest.raises(FaultNotVerified, match="still reached"), LinkDown(network, b, aim=c):
        pass


def test_flaps_that_did_not_happen_are_noticed(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = LinkDown(network, network.nodes[0])
    fault.inject()
    monkeypatch.setattr(fault, "_flaps", 3)
    with pytest.raises(FaultNotVerified, match="carrier change 1 times, not 7"):
        fault.verify()
    fault.heal()
    fault.verify_healed()


@pytest.mark.parametrize(
    "weather",
    [
        Weather(delay_s=0.05, jitter_s=0.01),
        Weather(loss=0.2),
        Weather(loss=1.0),
        Weather(duplicate=0.3),
        Weather(delay_s=0.02, reorder=0.2),
    ],
    ids=str,
)
def test_weather_falls_on_its_way_alone(relayed: RelayNetwork, weather: Weather) -> None:
    a, b = relayed.nodes
    with BadWeather(relayed, a, b, weather):
        back = probe(b, a, count=50)
        assert (back.loss, back.num_duplicates, back.num_late) == (0, 0, 0)


def test_a_connection_survives_bad_weather_unharmed(relayed: RelayNetwork) -> None:
    a, b = relayed.nodes
    client, server = tcp_pair(a, b)
    message = bytes(range(256)) * 200
    with client, server, BadWeather(relayed, a, b, Weather(delay_s=0.005, loss=0.02, duplicate=0.1, reorder=0.1)):
        client.sendall(message)
        client.shutdown(socket.SHUT_WR)
        received = b""
        while part := server.recv(65536):
            received += part
    assert received == message


@pytest.mark.parametrize(
    ("weather", "name"),
    [
        (Weather(delay_s=0.05), "delay"),
        (Weather(loss=0.2), "loss"),
        (Weather(duplicate=0.3), "duplicates"),
        (Weather(delay_s=0.02, reorder=0.2), "reordering"),
    ],
)
def test_weather_on_the_way_back_is_noticed(relayed: RelayNetwork, weather: Weather, name: str) -> None:
    a, b = relayed.nodes
    with pytest.raises(FaultNotVerified, match=name), BadWeather(relayed, a, b, weather, aim=(b, a)):
        pass


def test_senseless_weather_is_refused(relayed: RelayNetwork) -> None:
    with pytest.raises(ValueError, match=r"loss=1\.5"):
        Weather(loss=1.5)
    with pytest.raises(ValueError, match="reorder needs"):
        Weather(reorder=0.1)
    with pytest.raises(ValueError, match="too rare"):
        BadWeather(relayed, relayed.nodes[0], relayed.nodes[1], Weather(loss=0.0001))


def test_a_closed_network_leaves_no_namespace() -> None:
    before = ip("netns", "list")
    with offered(Network, 2) as one, offered(RelayNetwork, 2) as two:
        assert all(node.namespace in ip("netns", "list") for node in one.nodes + two.nodes)
    assert set(ip("netns", "list").split()) <= set(before.split())
