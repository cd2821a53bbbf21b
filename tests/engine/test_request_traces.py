"""Spans of one engine: phases, errors, steps; and nothing at all where nobody traces."""

import itertools
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llama4_dist.engine import request_traces
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.local import LocalEngine
from llama4_dist.engine.options import EngineOptions
from llama4_dist.model.batch import Batch
from llama4_dist.partition import Partition
from llama4_dist.request import EngineRequest, Sampling
from llama4_dist.stages.ports import worker_lost
from llama4_dist.telemetry import tracing
from llama4_dist.telemetry.tracing import UNTRACED, Tracing, is_sampled
from tests.checkpoints import make_checkpoint
from tests.cluster.running import Collector
from tests.engine.fake_model import FakeModel, fake_core

TRACE = f"00-{'ab' * 16}-{'cd' * 8}-01"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "scout")


@pytest.fixture
def exported() -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(Tracing(provider))
    yield exporter
    tracing.use(None)


def build(model_dir: Path) -> LocalEngine:
    return build_single_process(model_dir, num_threads=1, options=EngineOptions(num_blocks=64))


def run(engine: LocalEngine, *requests: EngineRequest) -> Collector:
    collector = Collector()
    engine.start(collector.collect)
    for request in requests:
        engine.submit(request)
    collector.wait_for([request.request_id for request in requests])
    engine.close()
    return collector


def request(name: str, trace: str, **fields: object) -> EngineRequest:
    sampling = Sampling(temperature=0.0, max_tokens=9, ignore_eos=True, seed=1)
    return EngineRequest(request_id=name, prompt_token_ids=(5, 6, 7), sampling=sampling, trace=trace, **fields)  # type: ignore[arg-type]


def test_only_what_is_traced_has_spans_and_its_phases_fill_it(model_dir: Path, exported: InMemorySpanExporter) -> None:
    run(build(model_dir), request("a", TRACE), request("b", ""), request("c", TRACE[:-1] + "0"))
    spans = {span.name: span for span in exported.get_finished_spans()}
    assert sorted(spans) == ["decode", "engine.request", "engine.step", "prefill", "queue"]
    assert len(exported.get_finished_spans()) == 5
    whole = spans["engine.request"]
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == "cd" * 8
    assert whole.attributes is not None
    assert whole.attributes["llama4_dist.finish_reason"] == "length"
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    assert [one.parent.span_id for one in phases if one.parent] == [whole.context.span_id] * 3
    taken_ns = [(one.end_time or 0) - (one.start_time or 0) for one in (*phases, whole)]
    assert sum(taken_ns[:3]) == pytest.approx(taken_ns[3], abs=2e6)
    step = spans["engine.step"].attributes or {}
    assert step["llama4_dist.sequences"] == 3
    assert step["llama4_dist.attention_s"] > 0  # type: ignore[operator]


def test_steps_in_flight_together_have_spans_of_their_own(
    model_dir: Path, exported: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a step with its own number and sequences; what the engine did in between is counted for one only."""
    monkeypatch.setattr(request_traces, "STEP_INTERVAL_S", 0.0)
    engine = build_single_process(
        model_dir, num_threads=1, options=EngineOptions(num_blocks=64), partition=Partition(num_stages=2)
    )
    run(engine, *(request(name, TRACE) for name in "abcd"))
    steps = [span for span in exported.get_finished_spans() if span.name == "engine.step"]
    numbers: list[Any] = [(span.attributes or {})["llama4_dist.step"] for span in steps]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == engine.stats().steps
    overlaps = [before.end_time > after.start_time for before, after in pairwise(steps)]  # type: ignore[operator]
    assert any(overlaps), "no two steps were in flight together"
    counted: list[Any] = [(span.attributes or {}).get("llama4_dist.model_s", 0.0) for span in steps]
    assert sum(counted) == pytest.approx(engine.stats().station_seconds["model"], rel=1e-6)


def test_a_request_that_fails_is_a_failed_span(model_dir: Path, exported: InMemorySpanExporter) -> None:
    run(build(model_dir), request("late", TRACE, timeout_s=0.0))
    (whole,) = (span for span in exported.get_finished_spans() if span.name == "engine.request")
    assert not whole.status.is_ok
    assert whole.status.description == "DEADLINE_EXCEEDED"


def test_a_step_that_nothing_came_of_is_a_failed_span_and_no_other_is(exported: InMemorySpanExporter) -> None:
    core = fake_core(clock=itertools.count(0.0, 2.0).__next__)  # every step is due to be recorded
    model = core.runner.model
    assert isinstance(model, FakeModel)
    traces: list[str] = []

    def lose(batch: Batch) -> None:
        traces.append(batch.trace)
        if len(traces) == 3:
            raise worker_lost("a member died")

    model.before_forward = lose
    core.add(request("a", TRACE))
    while core.scheduler.running or core.scheduler.waiting:
        core.step()
    core.renew()
    core.add(request("b", ""))
    core.step()
    steps = [span for span in exported.get_finished_spans() if span.name == "engine.step"]
    assert [span.status.description for span in steps] == [None, None, "WORKER_LOST"]
    assert [trace.split("-")[2] for trace in traces[:3]] == [f"{span.context.span_id:016x}" for span in steps]
    assert traces[3:] == [""], "a step that is not traced carries the trace of another"


def test_an_engine_of_a_process_that_does_not_trace_looks_at_no_trace(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(traceparent: str) -> bool:
        raise AssertionError("nobody traces")

    monkeypatch.setattr("llama4_dist.engine.request_traces.is_sampled", never)
    collector = run(build(model_dir), request("a", TRACE))
    assert len(collector.tokens["a"]) == 9


@pytest.mark.parametrize("parent", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 10_000])
def test_what_is_no_traceparent_begins_a_trace(exported: InMemorySpanExporter, parent: str) -> None:
    span = tracing.begin("generate", parent, {})
    assert is_sampled(span.traceparent)
    span.end()
    span.end("once is enough")
    (finished,) = exported.get_finished_spans()
    assert finished.parent is None
    assert finished.status.description is None


def test_without_tracing_a_span_is_nothing() -> None:
    span = tracing.begin("generate", TRACE, {})
    assert span is UNTRACED
    span.event("first_token")
    span.end()
    assert not span.traceparent
