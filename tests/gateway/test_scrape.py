"""The metrics page: who may read it, and that nobody holds it up."""

import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter

from llama4_dist.gateway import scrape
from llama4_dist.gateway.auth import read_tokens
from llama4_dist.gateway.scrape import exporter
from llama4_dist.gateway.settings import GatewaySettings
from tests.gateway.scripted_engine import ScriptedEngine
from tests.gateway.serving import serving
from tests.gateway.test_auth import NORMAL, OTHER, write_tokens


def page(port: int, *, host: str = "127.0.0.1", authorization: str | None = None) -> tuple[int, str]:
    headers = {} if authorization is None else {"Authorization": authorization}
    request = urllib.request.Request(f"http://{host}:{port}/metrics", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def registry() -> CollectorRegistry:
    made = CollectorRegistry()
    Counter("visits", "Visits.", registry=made).inc()
    return made


@pytest.mark.parametrize("wrong", [None, "Bearer", f"Bearer {OTHER}", f"Basic {NORMAL}", NORMAL])
def test_only_a_token_of_the_file_opens_the_page(wrong: str | None, tmp_path: Path) -> None:
    tokens = read_tokens(write_tokens(tmp_path, f"{NORMAL}\n"))
    with exporter(registry(), "127.0.0.1:0", tokens) as port:
        assert port is not None
        assert page(port, authorization=wrong) == (401, "")
        status, text = page(port, authorization=f"Bearer {NORMAL}")
    assert status == 200
    assert "visits_total 1.0" in text


def test_a_gateway_reads_its_scrapers_tokens_from_the_file(tmp_path: Path) -> None:
    file = write_tokens(tmp_path, f"{NORMAL}\n")
    settings = GatewaySettings(metrics_address="127.0.0.1:0", metrics_token_file=file)
    with serving(ScriptedEngine(), settings=settings) as served:
        port = served.gateway.metrics_port
        assert port is not None
        assert page(port)[0] == 401
        assert "llama4_dist_engine_up" in page(port, authorization=f"Bearer {NORMAL}")[1]


def test_who_says_nothing_is_dropped_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape.Handler, "timeout", 0.3)
    with (
        exporter(registry(), "127.0.0.1:0") as port,
        socket.create_connection(("127.0.0.1", port or 0)) as silent,
    ):
        assert page(port or 0)[0] == 200
        silent.settimeout(5)
        assert silent.recv(1) == b""


def test_the_page_is_served_on_ipv6_too() -> None:
    with exporter(registry(), "[::1]:0") as port:
        assert page(port or 0, host="[::1]")[0] == 200
