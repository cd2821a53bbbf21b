"""`llama4-dist health` against real gateways: exit codes, TLS, waiting."""

import json
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama4_dist.cli.app import app
from llama4_dist.gateway.settings import GatewaySettings
from tests.gateway.scripted_engine import ScriptedEngine
from tests.gateway.serving import serving
from tests.gateway.test_tls import Files

NOBODY = "127.0.0.1:9"


@pytest.mark.parametrize("condition", ["liveness", "readiness", "startup"])
def test_a_condition_that_holds_is_exit_code_0(condition: str) -> None:
    with serving(ScriptedEngine()) as served:
        result = CliRunner().invoke(app, ["health", "-s", served.address, "--condition", condition, "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"server": served.address, "condition": condition, "serving": True}


def test_a_draining_gateway_is_exit_code_4_and_alive() -> None:
    with serving(ScriptedEngine()) as served:
        served.gateway.health.set("readiness", False)
        served.gateway.admission.draining = True
        off = CliRunner().invoke(app, ["health", "-s", served.address])
        on = CliRunner().invoke(app, ["health", "-s", served.address, "--condition", "liveness"])
    assert (off.exit_code, on.exit_code) == (4, 0)
    assert "readiness" in off.stderr


def test_nobody_is_exit_code_4_and_an_unknown_condition_2() -> None:
    assert CliRunner().invoke(app, ["health", "-s", NOBODY]).exit_code == 4
    with serving(ScriptedEngine()) as served:
        assert CliRunner().invoke(app, ["health", "-s", served.address, "--condition", "x"]).exit_code == 2


def test_it_waits_for_a_condition_that_comes_and_gives_up_on_one_that_does_not() -> None:
    with serving(ScriptedEngine()) as served:
        served.gateway.admission.draining = True
        served.gateway.health.set("readiness", False)
        assert CliRunner().invoke(app, ["health", "-s", served.address, "--wait", "200ms"]).exit_code == 4

        def recover() -> None:
            time.sleep(0.3)
            served.gateway.admission.draining = False

        thread = threading.Thread(target=recover)
        thread.start()
        assert CliRunner().invoke(app, ["health", "-s", served.address, "--wait", "10s"]).exit_code == 0
        thread.join()


def test_a_certificate_of_the_services_name_passes_on_loopback(tmp_path: Path) -> None:
    files = Files(tmp_path)
    certificate, key = files.issue("service", "llama4-gateway")
    settings = GatewaySettings(tls_certificate=certificate, tls_key=key)
    with serving(ScriptedEngine(), settings=settings) as served:
        command = ["health", "-s", served.address, "--tls-ca", str(files.ca)]
        assert CliRunner().invoke(app, [*command, "--tls-server-name", "llama4-gateway"]).exit_code == 0
        assert CliRunner().invoke(app, command).exit_code == 4
