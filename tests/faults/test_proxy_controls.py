"""Faults of a byte stream that fall elsewhere, or on no traffic at all, are noticed."""

import socket

import pytest

from tests.faults.ends import PART, pair, receive
from tests.faults.fault import FaultNotVerified
from tests.faults.proxy import Proxy
from tests.faults.proxy_faults import HalfClose, Reset, Toxic
from tests.faults.toxics import Direction, Toxics

TO_SERVER, TO_CLIENT = Direction.TO_SERVER, Direction.TO_CLIENT

MISSED = {
    "delay": Toxics(delay_s=0.05),
    "bandwidth": Toxics(bytes_per_s=1000),
    "slices": Toxics(slice_bytes=2),
    "corruption": Toxics(corrupt_every=3),
    "blackhole": Toxics(blackhole=True),
    "cut": Toxics(drop_after=10),
}


@pytest.mark.parametrize("name", MISSED)
def test_toxics_on_the_wrong_direction_are_noticed_and_removed(
    proxy: Proxy, listener: socket.socket, name: str
) -> None:
    with pair(proxy, listener) as (client, server):
        fault = Toxic(proxy, TO_SERVER, MISSED[name], aim=TO_CLIENT, timeout_s=0.3)
        fault.inject()
        client.sendall(PART)
        receive(server, len(PART))
        with pytest.raises(FaultNotVerified, match=name):
            fault.verify()
        fault.heal()
        fault.verify_healed()


@pytest.mark.parametrize("name", MISSED)
def test_toxics_that_no_traffic_meets_are_noticed(proxy: Proxy, listener: socket.socket, name: str) -> None:
    fault = Toxic(proxy, TO_SERVER, MISSED[name], timeout_s=0.3)
    with pair(proxy, listener), pytest.raises(FaultNotVerified, match=name), fault:
        pass


def test_resetting_the_wrong_proxy_and_closing_the_wrong_half_are_noticed(
    proxy: Proxy, listener: socket.socket
) -> None:
    with pair(proxy, listener), Proxy("tcp:127.0.0.1:1") as other:
        with pytest.raises(FaultNotVerified, match="are gone"), Reset(proxy, aim=other):
            pass
        with pytest.raises(FaultNotVerified, match="seen the end"), HalfClose(proxy, TO_SERVER, aim=TO_CLIENT):
            pass
        with pytest.raises(FaultNotVerified, match="no connection"), Reset(other):
            pass
