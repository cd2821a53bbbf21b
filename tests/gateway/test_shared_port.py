"""Several gateways of one machine share a port where each was told to; the kernel deals out connections."""

import grpc
import pytest

from llama4_dist.errors import ConfigError
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.v1 import inference_pb2, inference_pb2_grpc
from tests.gateway.scripted_engine import ScriptedEngine
from tests.gateway.serving import serving

SHARED = GatewaySettings(reuse_port=True)
CONNECTIONS = 64  # that all of them reach one of two has a chance of 2 ** -63


def ask(address: str) -> None:
    """Generate over a connection of its own."""
    request = inference_pb2.GenerateRequest(stopping={"max_tokens": 1})
    request.token_ids.ids.append(1)
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=20.0)


def test_two_gateways_answer_at_one_port() -> None:
    first, second = ScriptedEngine(), ScriptedEngine()
    with serving(first, settings=SHARED) as served, serving(second, settings=SHARED, address=served.address):
        for _ in range(CONNECTIONS):
            ask(served.address)
    assert len(first.submitted) + len(second.submitted) == CONNECTIONS
    assert first.submitted
    assert second.submitted


def test_a_port_is_shared_only_by_those_who_were_told_to() -> None:
    engine = ScriptedEngine()
    with (
        serving(ScriptedEngine(), settings=SHARED) as served,
        pytest.raises(ConfigError, match="cannot be bound"),
        serving(engine, address=served.address),
    ):
        pass
