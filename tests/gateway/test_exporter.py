"""The port that is scraped: who may, and what a hanging source costs."""

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from llama4_dist.errors import ConfigError, UnavailableError
from llama4_dist.gateway.metrics import Metrics
from llama4_dist.gateway.observe import exporter as exporting
from llama4_dist.gateway.observe.exporter import exporter
from llama4_dist.gateway.observe.sampled import Sampled
from llama4_dist.gateway.settings import GatewaySettings
from tests.waiting import wait_until

TOKEN = "a-token-of-prometheus"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def port(token_file: Path) -> Iterator[int]:
    with exporter(Metrics().registry, "127.0.0.1:0", token_file=token_file) as port:
        assert port is not None
        yield port


def scrape(port: int, authorization: str | None) -> str:
    headers = {} if authorization is None else {"Authorization": authorization}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return str(answer.read().decode())


def test_the_bearer_of_a_token_may_scrape(port: int) -> None:
    assert "llama4_dist_build_info" in scrape(port, f"Bearer {TOKEN}")


@pytest.mark.parametrize("authorization", [None, "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x"])
def test_nobody_else_may(port: int, authorization: str | None) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        scrape(port, authorization)
    assert refused.value.code == 401


def test_beyond_loopback_a_token_file_is_needed(token_file: Path) -> None:
    with pytest.raises(ConfigError, match="metrics_token_file"):
        GatewaySettings(metrics_address="0.0.0.0:9100")
    GatewaySettings(metrics_address="0.0.0.0:9100", metrics_token_file=token_file)


def test_connections_that_say_nothing_are_bounded(port: int) -> None:
    def serving() -> int:
        return sum("process_request_thread" in thread.name for thread in threading.enumerate())

    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(exporting.MAX_CONNECTIONS + 20)]
    wait_until(lambda: serving() == exporting.MAX_CONNECTIONS)
    time.sleep(0.3)
    assert serving() == exporting.MAX_CONNECTIONS
    for connection in silent:
        connection.close()

    def has_room() -> bool:
        with suppress(OSError, urllib.error.URLError):
            return bool(scrape(port, f"Bearer {TOKEN}"))
        return False

    wait_until(has_room)


def test_a_source_that_hangs_costs_one_thread_and_a_bounded_wait() -> None:
    release, calls = threading.Event(), []

    def hang() -> int:
        calls.append(1)
        release.wait(10)
        return 7

    sampled = Sampled(hang, patience_s=0.2)
    began_s = time.monotonic()
    assert sampled.read() is None
    assert time.monotonic() - began_s < 1.0
    began_s = time.monotonic()
    assert sampled.read() is None, "what is under way is not begun again"
    assert time.monotonic() - began_s < 0.1, "its time is over already"
    assert (len(calls), sampled.age_s) == (1, None)
    release.set()
    sampled._last.done.wait(5)  # type: ignore[union-attr]
    assert sampled.read() == 7
    assert sampled.age_s is not None


def test_a_reading_is_shared_while_it_is_fresh_and_never_after_a_failure() -> None:
    now_s, answers = [0.0], iter([1, 2])

    def source() -> int:
        try:
            return next(answers)
        except StopIteration:
            raise UnavailableError("it is away") from None

    sampled = Sampled(source, fresh_s=1.0, patience_s=5.0, clock=lambda: now_s[0])
    assert [sampled.read(), sampled.read()] == [1, 1]
    now_s[0] = 1.0
    assert sampled.read() == 2
    now_s[0] = 2.5
    assert sampled.read() is None, "the last value is stale"
    assert sampled.age_s == 1.5
