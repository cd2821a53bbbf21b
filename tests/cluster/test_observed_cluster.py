"""A real cluster seen from outside: metrics of every worker, one trace a request, also where workers die."""

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray

from cluster.observe.collector import ClusterCollector
from cluster.ray_engine import RayEngine
from cluster.worker import Role, State
from llama4_dist.engine.options import EngineOptions
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.request import Sampling
from llama4_dist.rpc.wire import generate_to_proto
from llama4_dist.telemetry import tracing
from llama4_dist.telemetry.settings import Telemetry
from llama4_dist.v1 import inference_pb2, inference_pb2_grpc
from tests.checkpoints import make_checkpoint
from tests.exported import differences
from tests.gateway.serving import Served, serving
from tests.scraping import Scrape, scrape
from tests.telemetry.collector import Collected, collecting
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

CALLER = "00f067aa0ba902b7"
HOSTS, ATTENTION = ("expert-0", "expert-1"), ("attention-0", "attention-1")


@pytest.fixture(scope="module")
def collected() -> Iterator[Collected]:
    with collecting() as collected:
        yield collected


@pytest.fixture(scope="module")
def telemetry(collected: Collected) -> Telemetry:
    return Telemetry(log_format="json", trace_endpoint=collected.endpoint)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, telemetry: Telemetry) -> Iterator[RayEngine]:
    model_dir = make_checkpoint(tmp_path_factory.mktemp("scout"), "scout")
    options = EngineOptions(num_blocks=256, max_num_seqs=8, model_name="tiny")
    engine = RayEngine(
        model_dir, num_expert_hosts=2, num_attention_workers=2, num_threads=1, options=options, telemetry=telemetry
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def served(engine: RayEngine, telemetry: Telemetry) -> Iterator[Served]:
    tracing.configure_tracing(telemetry, instance="gateway-1", role="gateway")
    collector = ClusterCollector(engine.control.reading, engine.control.head_answers, per_expert=True, fresh_s=0.0)
    settings = GatewaySettings(metrics_address="127.0.0.1:0")
    with serving(engine, settings=settings, collectors=[collector]) as served:
        yield served
    tracing.use(None)


@pytest.fixture
def stub(served: Served) -> Iterator[inference_pb2_grpc.InferenceServiceStub]:
    with grpc.insecure_channel(served.address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def request_of(max_tokens: int) -> inference_pb2.GenerateRequest:
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return generate_to_proto([5, 6, 7, 8], sampling, model="", request_id="", priority=0)


def traced(trace: str) -> tuple[tuple[str, str], ...]:
    return (("traceparent", f"00-{trace}-{CALLER}-01"),)


def seen(served: Served) -> Scrape:
    return scrape(served.gateway.metrics_port)


def all_up(served: Served) -> None:
    wait_until(lambda: seen(served).all("worker_up") == [1.0] * 4, "all workers are up")
    wait_until(lambda: not seen(served).all("scale_operation_running"), "no change runs")


def pid_of(engine: RayEngine, worker: str) -> int:
    return next(status.pid for status in engine.status() if status.worker == worker)


def a_trace_with_a_step(stub: inference_pb2_grpc.InferenceServiceStub, collected: Collected) -> str:
    """Have requests answered until one had a step recorded, which is one a second; return its trace."""
    for number in itertools.count(1):
        trace = f"4bf92f3577b34da6a3ce929d{number:08x}"
        stub.Generate(request_of(30), metadata=traced(trace), timeout=30)
        collected.wait_for(trace, "generate", "engine.request", "queue", "prefill", "decode")
        if collected.of(trace, "engine.step"):
            break
    return trace


def rows_by_host(served: Served) -> list[float]:
    found = seen(served)
    return [sum(found.all("dispatch_rows_total", host=host)) for host in HOSTS]


@contextmanager
def traffic(
    served: Served, stub: inference_pb2_grpc.InferenceServiceStub, num_streams: int = 4
) -> Iterator[list[BaseException]]:
    """Generate all the while, from when rows go to both hosts; yields what went wrong."""
    stop, failures = threading.Event(), list[BaseException]()
    before = rows_by_host(served)

    def run() -> None:
        try:
            while not stop.is_set():
                stub.Generate(request_of(100), timeout=60)
        except grpc.RpcError as error:
            failures.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(num_streams)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: all(now > then for now, then in zip(rows_by_host(served), before, strict=True)), "rows")
        yield failures
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_a_request_is_one_trace_from_the_caller_to_the_hosts(
    served: Served, stub: inference_pb2_grpc.InferenceServiceStub, collected: Collected
) -> None:
    trace = a_trace_with_a_step(stub, collected)
    (whole,) = collected.of(trace, "generate")
    assert whole.parent_id == CALLER
    assert whole.instance == "gateway-1"
    assert [name for name, _ in whole.events] == ["admitted", "first_token", "finished"]
    (request,) = collected.of(trace, "engine.request")
    assert request.parent_id == whole.span_id
    assert request.instance in ATTENTION
    assert request.attributes["output_tokens"] == 30
    phases = [span for name in ("queue", "prefill", "decode") for span in collected.of(trace, name)]
    assert len(phases) == 3
    assert {span.parent_id for span in phases} == {request.span_id}
    assert sum(span.seconds for span in phases) == pytest.approx(request.seconds, abs=1e-3)
    step, *_ = collected.of(trace, "engine.step")
    assert step.parent_id == whole.span_id
    hosts = {said["host"] for _, said in step.events}
    assert hosts <= set(HOSTS)
    assert hosts
    assert all(said["reply_s"] > 0 for _, said in step.events)


def test_every_worker_and_what_it_did_is_seen(served: Served, stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    all_up(served)
    with traffic(served, stub):
        wait_until(lambda: seen(served).all("expert_balancedness"), "rows between two scrapes")
        found = seen(served)
    assert found.labels("worker_up", "worker") == {*HOSTS, *ATTENTION}
    assert found.labels("engine_up", "worker") == set(ATTENTION)
    assert found.labels("expert_worker_tokens_total", "worker") == set(HOSTS)
    assert min(found.all("expert_worker_tokens_total")) > 0
    assert set(found.all("expert_replicas")) == {2.0}
    assert found.labels("dispatch_rows_total", "group") <= set(ATTENTION), "who is not cut is a group of its own"
    assert found.all("expert_balancedness"), "two scrapes are a window"
    assert all(0 < even <= 1 for even in found.all("expert_balancedness"))
    assert found.labels("dispatch_bytes_total", "transport") == {"unix"}
    assert found.labels("dispatch_bytes_total", "direction") == {"in", "out"}
    assert sum(found.all("dispatch_latency_seconds_count")) > 0
    assert sum(found.all("attention_wait_on_experts_seconds_total")) > 0
    assert min(found.all("worker_resident_memory_bytes")) > 10e6
    assert min(found.all("worker_cpu_seconds_total")) > 0
    found = seen(served)  # nobody generates: both ends agree, but for rows that were asked twice to compare the answers
    rows_sent, rows_computed = sum(found.all("dispatch_rows_total")), sum(found.all("expert_worker_tokens_total"))
    assert rows_sent <= rows_computed <= rows_sent + 32 * sum(found.all("dispatch_checked_frames_total"))
    assert sum(found.all("expert_tokens_total")) == rows_computed
    assert not differences(found)


def test_what_its_caller_does_not_trace_is_not_traced(
    stub: inference_pb2_grpc.InferenceServiceStub, collected: Collected
) -> None:
    unsampled = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
    stub.Generate(request_of(5), metadata=(("traceparent", f"00-{unsampled}-{CALLER}-00"),), timeout=30)
    own = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    stub.Generate(request_of(5), metadata=traced(own), timeout=30)
    collected.wait_for(own, "decode")
    assert all(span.trace_id != unsampled for span in collected.spans)


def test_a_replayed_request_stays_one_trace_and_is_counted(
    served: Served, engine: RayEngine, stub: inference_pb2_grpc.InferenceServiceStub, collected: Collected
) -> None:
    all_up(served)
    trace = "cccccccccccccccccccccccccccccccc"
    stream = stub.StreamGenerate(
        inference_pb2.StreamGenerateRequest(request=request_of(1000)), metadata=traced(trace), timeout=60
    )
    next(stream)
    (busy,) = (worker for worker in ATTENTION if seen(served).value("requests_running", worker=worker))
    os.kill(pid_of(engine, busy), signal.SIGKILL)
    num_tokens = sum(len(event.delta.token_ids) for event in stream if event.HasField("delta"))
    assert num_tokens > 0
    (other,) = set(ATTENTION) - {busy}
    collected.wait_for(trace, "generate", "replay", "engine.request")
    (whole,), (replay,), (request,) = (collected.of(trace, name) for name in ("generate", "replay", "engine.request"))
    assert {replay.parent_id, request.parent_id} == {whole.span_id}
    assert (replay.attributes["from"], replay.attributes["to"]) == (busy, other)
    assert request.instance == other
    assert request.attributes["replayed_tokens"] > 0
    found = seen(served)
    assert found.value("requests_replayed_total", worker=busy) == 1.0
    wait_until(lambda: seen(served).value("workers_lost_total", worker=busy, role="attention") == 1.0, "the loss")
    all_up(served)


def test_a_host_that_stands_still_is_hedged_and_named(
    served: Served, engine: RayEngine, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    all_up(served)

    def hedged() -> list[float]:
        found = seen(served)
        return [sum(found.all("dispatch_hedged_rows_total", host=host)) for host in HOSTS]

    def is_named() -> bool:
        """More than the other, which may be late on a busy machine too."""
        grown = [now - then for now, then in zip(hedged(), before, strict=True)]
        return grown[1] > grown[0]

    with traffic(served, stub) as failures:
        before = hedged()
        pid = pid_of(engine, "expert-1")
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until(is_named, "hedges")
        finally:
            os.kill(pid, signal.SIGCONT)
    assert not failures
    assert sum(seen(served).all("dispatch_resent_rows_total")) > 0


def test_a_host_that_dies_is_down_until_its_successor_serves(
    served: Served, engine: RayEngine, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    all_up(served)
    lost_before = sum(seen(served).all("dispatch_links_lost_total"))
    with traffic(served, stub) as failures:
        os.kill(pid_of(engine, "expert-0"), signal.SIGKILL)
        wait_until(lambda: seen(served).value("worker_up", worker="expert-0") == 0.0, "expert-0 is down")
        found = seen(served)
        assert found.value("expert_worker_tokens_total", worker="expert-0") is None
        wait_until(lambda: seen(served).value("worker_up", worker="expert-0") == 1.0, "its successor is up")
    assert not failures
    found = seen(served)
    assert sum(found.all("dispatch_links_lost_total")) > lost_before
    assert found.value("workers_lost_total", worker="expert-0", role="expert") == 1.0
    wait_until(lambda: seen(served).value("scale_operations_total", kind="repair", result="done"), "the repair")
    assert found.value("controller_up") == 1.0


def test_every_process_logs_objects_that_say_whose_they_are(engine: RayEngine, served: Served) -> None:
    assert engine.status()[0].state is State.READY
    lines = []
    node: Any = ray._private.worker._global_node
    folder = Path(node.get_logs_dir_path())
    for file in folder.glob("worker-*.err"):
        for line in file.read_text(errors="replace").splitlines():
            if line.startswith("{"):
                lines.append(json.loads(line))
    roles = {line["role"] for line in lines if line.get("role")}
    assert roles == {str(role) for role in Role} - {Role.STAGE}, "the model is not cut"
    adopted = [line for line in lines if line.get("event") == "topology_adopted"]
    assert {line["worker"] for line in adopted} == set(ATTENTION)
    assert all(line["epoch"] == line["fields"]["epoch"] for line in adopted)


def test_a_scrape_does_not_wait_for_workers_that_stand_still(served: Served, engine: RayEngine) -> None:
    all_up(served)
    with ExitStack() as stack:
        for worker in (*HOSTS, *ATTENTION):
            pid = pid_of(engine, worker)
            stack.callback(os.kill, pid, signal.SIGCONT)
        for status in engine.status()[1:]:
            os.kill(status.pid, signal.SIGSTOP)
        began_s = time.monotonic()
        found = seen(served)
        assert time.monotonic() - began_s < 8.0, "below Prometheus's timeout of 10 s"
        assert found.value("gateway_requests") == 0.0
        assert not found.all("expert_worker_tokens_total")
