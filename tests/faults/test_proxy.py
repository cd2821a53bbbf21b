"""The proxy does to each direction what it was told, proves it, and leaves nothing behind."""

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.ends import PART, chatter, connect_and_receive, pair, receive, send_and_receive
from tests.faults.fault import must
from tests.faults.proxy import Proxy
from tests.faults.proxy_faults import HalfClose, Reset, Toxic
from tests.faults.toxics import Direction, Toxics

TO_SERVER, TO_CLIENT = Direction.TO_SERVER, Direction.TO_CLIENT


def test_bytes_pass_unchanged_both_ways_and_ends_are_passed_on(proxy: Proxy, listener: socket.socket) -> None:
    with pair(proxy, listener) as (client, server):
        client.sendall(PART)
        assert receive(server, len(PART)) == PART
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        server.sendall(PART)
        assert receive(client, len(PART)) == PART
        server.close()
        assert client.recv(1) == b""
    must(lambda: not proxy.connections(), "the connection is over")
    assert proxy.counters(TO_SERVER).passed == proxy.counters(TO_CLIENT).passed == len(PART)


def test_unix_sockets_are_carried_too(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "server"))
        listener.listen()
        listener.settimeout(5.0)
        proxy = Proxy(f"unix:{tmp_path}/server", listen=f"unix:{tmp_path}/links/proxy")
        with proxy, pair(proxy, listener) as (client, server):
            client.sendall(PART)
            assert receive(server, len(PART)) == PART
            with Reset(proxy):
                assert client.recv(1) == server.recv(1) == b""


def test_delay_holds_every_byte_back_for_as_long_as_told(proxy: Proxy, listener: socket.socket) -> None:
    with pair(proxy, listener) as (client, server):
        fault = Toxic(proxy, TO_SERVER, Toxics(delay_s=0.1, jitter_s=0.05))
        fault.inject()
        begun_s = time.monotonic()
        client.sendall(PART)
        assert receive(server, len(PART)) == PART
        assert time.monotonic() - begun_s >= 0.1
        fault.verify()
        fault.heal()
        fault.verify_healed()


def test_a_narrow_direction_lets_so_many_bytes_a_second_pass_and_presses_back(
    proxy: Proxy, listener: socket.socket
) -> None:
    narrow = Toxic(proxy, TO_SERVER, Toxics(bytes_per_s=100_000))
    narrow.inject()  # before the first byte: what went through unhindered would wait at the server
    with pair(proxy, listener) as (client, server), chatter(client):
        begun_s = time.monotonic()
        receive(server, 50_000)
        assert time.monotonic() - begun_s > 0.4
        narrow.verify()
        must(lambda: proxy.counters(TO_SERVER).read < 50_000_000, "the sender was held up")
        narrow.heal()
        receive(server, 1_000_000)
        narrow.verify_healed()


def test_slices_are_sent_apart(proxy: Proxy, listener: socket.socket) -> None:
    with pair(proxy, listener) as (client, server):
        fault = Toxic(proxy, TO_SERVER, Toxics(slice_bytes=3))
        fault.inject()
        client.sendall(PART[:100])
        assert len(server.recv(100)) <= 6, "one slice, or two that met"
        fault.verify()
        fault.heal()


def test_corruption_flips_one_bit_in_every_kth_byte_and_the_seed_says_which(listener: socket.socket) -> None:
    results = []
    for seed in (1, 1, 2):
        with Proxy(f"tcp:127.0.0.1:{listener.getsockname()[1]}", seed=seed) as proxy, pair(proxy, listener) as ends:
            fault = Toxic(proxy, TO_CLIENT, Toxics(corrupt_every=100))
            fault.inject()
            ends[1].sendall(PART)
            got = receive(ends[0], len(PART))
            fault.verify()
            fault.heal()
            fault.verify_healed()
        flips = {place: (a ^ b).bit_count() for place, (a, b) in enumerate(zip(got, PART, strict=True)) if a != b}
        assert flips == dict.fromkeys(range(99, len(PART), 100), 1)
        results.append(got)
    assert results[0] == results[1] != results[2]


def test_a_black_hole_swallows_until_it_is_healed_then_old_bytes_arrive(proxy: Proxy, listener: socket.socket) -> None:
    with pair(proxy, listener) as (client, server):
        fault = Toxic(proxy, TO_SERVER, Toxics(blackhole=True))
        fault.inject()
        client.sendall(PART)
        fault.verify()
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.recv(1)
        server.sendall(b"other way")
        assert receive(client, 9) == b"other way"
        fault.heal()
        fault.verify_healed()
        server.settimeout(5.0)
        assert receive(server, len(PART)) == PART


@pytest.mark.parametrize("num_bytes", [0, 1, 17, 9999])
def test_a_frame_can_be_cut_at_any_byte_and_the_connection_dropped(
    proxy: Proxy, listener: socket.socket, num_bytes: int
) -> None:
    with pair(proxy, listener) as (client, server):
        fault = Toxic(proxy, TO_SERVER, Toxics(drop_after=num_bytes))
        fault.inject()
        with pytest.raises(ConnectionError):
            send_and_receive(client, server)
        fault.verify()
        assert proxy.counters(TO_SERVER).passed == num_bytes
        fault.heal()
        fault.verify_healed()


def test_a_direction_can_fall_silent_after_so_many_bytes(proxy: Proxy, listener: socket.socket) -> None:
    with pair(proxy, listener) as (client, server):
        fault = Toxic(proxy, TO_SERVER, Toxics(silent_after=17))
        fault.inject()
        client.sendall(PART)
        client.shutdown(socket.SHUT_WR)
        assert receive(server, 17) == PART[:17]
        fault.verify()
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.recv(1)
        fault.heal()
        fault.verify_healed()
        server.settimeout(5.0)
        assert receive(server, len(PART)) == PART[17:]
        assert server.recv(1) == b""


def test_a_reset_reaches_both_sides_and_new_connections_pass(proxy: Proxy, listener: socket.socket) -> None:
    with pair(proxy, listener) as ends, Reset(proxy):
        for end in ends:
            with pytest.raises(ConnectionResetError):
                end.recv(1)
    with pair(proxy, listener) as (client, server):
        client.sendall(b"again")
        assert receive(server, 5) == b"again"


def test_half_a_connection_ends_and_the_other_half_goes_on(proxy: Proxy, listener: socket.socket) -> None:
    with pair(proxy, listener) as (client, server):
        with HalfClose(proxy, TO_SERVER):
            assert server.recv(1) == b""
            server.sendall(PART)
            assert receive(client, len(PART)) == PART
        client.sendall(b"for nobody")
        must(lambda: proxy.counters(TO_SERVER).dropped == 10, "what comes is dropped")


def test_a_server_that_refuses_resets_the_client(listener: socket.socket) -> None:
    with Proxy(f"tcp:127.0.0.1:{listener.getsockname()[1]}") as proxy:
        listener.close()
        with socket.socket() as client, pytest.raises(ConnectionResetError):
            connect_and_receive(client, proxy)


def test_a_black_hole_keeps_what_was_under_way(proxy: Proxy, listener: socket.socket) -> None:
    with pair(proxy, listener) as (client, server):
        proxy.set(TO_SERVER, Toxics(delay_s=0.2))
        client.sendall(b"late")
        must(lambda: proxy.counters(TO_SERVER).read == 4, "it is under way")
        proxy.set(TO_SERVER, Toxics(blackhole=True))
        server.settimeout(0.4)
        with pytest.raises(TimeoutError):
            server.recv(4)


def test_closing_ends_connections_that_run(proxy: Proxy, listener: socket.socket) -> None:
    with pair(proxy, listener) as (client, server):
        proxy.close()
        assert client.recv(1) == server.recv(1) == b""


def test_a_closed_proxy_leaves_neither_thread_nor_descriptor(listener: socket.socket) -> None:
    def num_threads() -> int:
        return sum(thread.name.startswith("proxy ") for thread in threading.enumerate())

    fds, threads = len(os.listdir("/proc/self/fd")), num_threads()
    with Proxy(f"tcp:127.0.0.1:{listener.getsockname()[1]}") as proxy, pair(proxy, listener) as (client, _):
        client.sendall(PART)
        assert num_threads() == threads + 1
    proxy.close()
    assert num_threads() == threads
    assert len(os.listdir("/proc/self/fd")) <= fds  # what an earlier test left may close meanwhile
    with pytest.raises(RuntimeError, match="does not answer"):
        proxy.connections()


@pytest.mark.parametrize(("field", "value"), [("bytes_per_s", 0), ("slice_bytes", -1), ("delay_s", -0.1)])
def test_senseless_toxics_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Toxics(**{field: value})
