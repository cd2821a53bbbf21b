"""SIGTERM once drains, twice stops at once; a real process and real signals."""

import gc
import os
import signal
import subprocess
import time

import pytest

from llama4_dist.client import Client
from llama4_dist.errors import UnavailableError
from llama4_dist.gateway.run import Gateway, serve
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.request import Sampling
from tests.gateway.scripted_engine import ScriptedEngine, expected_tokens
from tests.gateway.serving_process import serving_process
from tests.waiting import wait_until


def said(running: "subprocess.Popen[str]") -> str:
    assert running.stdout is not None
    return running.stdout.read()


def is_draining(client: Client) -> bool:
    try:
        client.generate([1], Sampling(max_tokens=1))
    except UnavailableError as error:
        return error.reason == "DRAINING"
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_running_requests_finish(number: signal.Signals) -> None:
    with serving_process(0.01) as (running, client, _):
        deltas = iter(client.stream_generate([5], Sampling(max_tokens=100)))
        received = list(next(deltas).token_ids)
        running.send_signal(number)
        wait_until(lambda: is_draining(client))
        received += [token for delta in deltas for token in delta.token_ids]
        assert tuple(received) == expected_tokens([5], 100)
        assert running.wait(timeout=60) == 0
        assert said(running) == "stopped 0\n"


def test_the_second_signal_stops_at_once() -> None:
    with serving_process(0.05) as (running, client, _):
        deltas = iter(client.stream_generate([5], Sampling(max_tokens=500)))
        next(deltas)
        running.send_signal(signal.SIGTERM)
        wait_until(lambda: is_draining(client))
        began_s = time.monotonic()
        running.send_signal(signal.SIGTERM)
        with pytest.raises(UnavailableError) as cut:
            list(deltas)
        assert cut.value.reason == "DRAINING"
        assert running.wait(timeout=60) == 0
        assert time.monotonic() - began_s < 5.0


async def test_what_was_made_before_serving_is_kept_out_of_garbage_collection() -> None:
    """A full collection over torch's objects stands still for tens of milliseconds."""
    engine, seen = ScriptedEngine(), []

    def on_ready(gateway: Gateway) -> None:
        seen.append(gc.get_freeze_count())
        os.kill(os.getpid(), signal.SIGTERM)

    await serve(engine, None, GatewaySettings(address="127.0.0.1:0"), on_ready=on_ready)
    engine.close()
    assert seen[0] > 10_000
    assert gc.get_freeze_count() == 0
