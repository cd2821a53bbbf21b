"""Liveness, readiness, reflection and metrics: what operators and probes see."""

import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from llama4_dist.client import Client, ConnectOptions
from llama4_dist.errors import ConfigError, NotFoundError, UnavailableError
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.request import Sampling
from tests.gateway.scripted_engine import ScriptedEngine
from tests.gateway.serving import Served, serving
from tests.waiting import wait_until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="module")
def served(engine: ScriptedEngine) -> Iterator[Served]:
    with serving(
        engine, settings=GatewaySettings(metrics_address="127.0.0.1:0", unready_after_failure_s=0.6)
    ) as running:
        yield running


@pytest.mark.parametrize("service", ["", "liveness", "readiness", "startup"])
def test_a_started_gateway_is_healthy_in_every_respect(served: Served, service: str) -> None:
    with Client(served.address) as client:
        client.wait_ready(5)
        assert client.health(service)


def test_an_unknown_condition_is_not_found(served: Served) -> None:
    with Client(served.address) as client, pytest.raises(NotFoundError):
        client.health("nonsense")


def test_readiness_follows_the_age_of_the_queue(served: Served, engine: ScriptedEngine) -> None:
    with Client(served.address) as client:
        engine.queue_age_s = 1000.0
        wait_until(lambda: not client.health("readiness"), timeout_s=2.0)
        assert client.health("liveness")
        engine.queue_age_s = 0.0
        wait_until(lambda: client.health("readiness"), timeout_s=2.0)


@pytest.mark.parametrize("failure", [UnavailableError("no attention worker"), RuntimeError("a defect")])
def test_readiness_is_off_while_the_engine_cannot_answer(
    served: Served, engine: ScriptedEngine, failure: Exception
) -> None:
    with Client(served.address) as client:
        engine.stats_error = failure
        wait_until(lambda: not client.health("readiness"), timeout_s=2.0)
        with pytest.raises(UnavailableError, match="not ready"):
            client.wait_ready(0.2)
        engine.stats_error = None
        wait_until(lambda: client.health("readiness"), timeout_s=2.0)


def test_readiness_is_off_after_requests_ended_as_unavailable(served: Served, engine: ScriptedEngine) -> None:
    """An engine that lost every replica of an expert counts well and serves nothing."""
    with Client(served.address, ConnectOptions(max_attempts=1)) as client:
        wait_until(lambda: client.health("readiness"), timeout_s=2.0)
        engine.fail_at = {0: UnavailableError("no live replica", reason="EXPERT_UNREACHABLE")}
        with pytest.raises(UnavailableError):
            client.generate([1], Sampling(max_tokens=2))
        engine.fail_at = {}
        wait_until(lambda: not client.health("readiness"), timeout_s=1.5)
        wait_until(lambda: client.health("readiness"), timeout_s=3.0)


def test_watchers_of_one_condition_do_not_disturb_each_other(served: Served, engine: ScriptedEngine) -> None:
    with grpc.insecure_channel(served.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        leaver, stayer = (stub.Watch(health_pb2.HealthCheckRequest(service="readiness")) for _ in range(2))
        assert next(leaver).status == next(stayer).status == SERVING
        leaver.cancel()
        engine.queue_age_s = 1000.0
        assert next(stayer).status == NOT_SERVING
        engine.queue_age_s = 0.0
        assert next(stayer).status == SERVING
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nonsense"))
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        stayer.cancel()
        unknown.cancel()


def listed_services(address: str) -> set[str]:
    with grpc.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
    return {service.name for service in answer.list_services_response.service}


def test_reflection_lists_the_services(served: Served) -> None:
    assert listed_services(served.address) == {
        "llama4_dist.v1.InferenceService",
        "llama4_dist.v1.TokenizerService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_reflection_that_is_off_is_unimplemented() -> None:
    with serving(ScriptedEngine(), settings=GatewaySettings(reflection=False)) as served:
        with pytest.raises(grpc.RpcError) as refused:
            listed_services(served.address)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def scrape(served: Served) -> dict[str, float]:
    url = f"http://127.0.0.1:{served.gateway.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for sample in samples
    }


def test_metrics_count_requests_tokens_and_the_engine(served: Served) -> None:
    before = scrape(served)
    with Client(served.address) as client:
        client.generate([1], Sampling(max_tokens=7))
        list(client.stream_generate([1], Sampling(max_tokens=3, stop_token_ids=(97,))))
    after = scrape(served)
    length = "llama4_dist_requests_total finish_reason=length"
    stop = "llama4_dist_requests_total finish_reason=stop"
    ended = sum(after.get(name, 0) - before.get(name, 0) for name in (length, stop))
    assert ended == 2
    assert after["llama4_dist_streamed_tokens_total"] - before["llama4_dist_streamed_tokens_total"] >= 8
    assert after["llama4_dist_time_to_first_token_seconds_count"] >= 2
    whole = "llama4_dist_e2e_request_latency_seconds_count"
    assert after[whole] - before[whole] == 2
    assert after["llama4_dist_kv_cache_usage_ratio worker=local"] == 0.0
    assert after["llama4_dist_engine_steps_total worker=local"] > 0
    sender = "group=local host=expert-0 rank=0 stage=0 transport=inproc worker=local"
    assert after[f"llama4_dist_dispatch_bytes_total direction=out {sender}"] == 5
    assert after["llama4_dist_gateway_requests"] == 0


def test_metrics_go_on_while_the_engine_is_gone(served: Served, engine: ScriptedEngine) -> None:
    assert scrape(served)["llama4_dist_engine_up worker=local"] == 1.0
    engine.stats_error = UnavailableError("no attention worker")
    samples = scrape(served)
    engine.stats_error = None
    assert samples["llama4_dist_engine_up worker=local"] == 0.0
    assert samples["llama4_dist_engines"] == 0.0
    assert "llama4_dist_gateway_requests" in samples


def test_a_metrics_port_that_is_taken_is_refused(served: Served) -> None:
    settings = replace(GatewaySettings(), metrics_address=f"127.0.0.1:{served.gateway.metrics_port}")
    with pytest.raises(ConfigError, match="metrics_address"), serving(ScriptedEngine(), settings=settings):
        pass


def test_the_exporter_stops_with_the_gateway() -> None:
    with serving(ScriptedEngine(), settings=GatewaySettings(metrics_address="127.0.0.1:0")) as served:
        port = served.gateway.metrics_port
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2)
