"""What members of an attention group tell: counters as any worker that sends rows, and their parts of a traced step."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.observe.families import cluster_metrics
from cluster.reading import ClusterReading, StageReading
from cluster.worker import Role
from llama4_dist.errors import UnavailableError
from llama4_dist.partition import Partition
from llama4_dist.telemetry import tracing
from llama4_dist.telemetry.tracing import Tracing
from tests.checkpoints import make_checkpoint
from tests.cluster.local_group import WIDE, Cluster, serve
from tests.cluster.running import Collector, some_requests
from tests.scraping import Scrape
from tests.waiting import wait_until

TRACE = f"00-{'ab' * 16}-{'cd' * 8}-01"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("scout"), "scout")


@pytest.fixture
def make(model_dir: Path) -> Iterator[Callable[[Partition], Cluster]]:
    with ExitStack() as resources, tempfile.TemporaryDirectory(prefix="l4-") as folder:
        yield lambda partition: Cluster(model_dir, Path(folder) / "run", partition, resources)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Every step that serves a traced request is recorded."""
    monkeypatch.setattr("llama4_dist.engine.request_traces.STEP_INTERVAL_S", 0.0)
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(Tracing(provider))
    yield exporter
    tracing.use(None)


def readings(cluster: Cluster) -> dict[str, StageReading]:
    """Read all members, once each has noted its last part: it does when the leader may have that already."""
    last: dict[str, StageReading] = {}

    def is_settled() -> bool:
        last.update({name: cluster.plain(name).reading() for name in cluster.stages})
        return len({one.parts for one in last.values()}) == 1

    wait_until(is_settled)
    return last


def seen(cluster: Cluster) -> Scrape:
    reading = ClusterReading(
        epoch=1, workers=(), hosts=(), replicas={}, ended={}, stages=tuple(readings(cluster).values())
    )
    return Scrape(cluster_metrics(reading))


class Served:
    """A group that was formed, and serves."""

    def __init__(self, cluster: Cluster) -> None:
        cluster.form(1)
        self._engine, self._collector = serve(cluster), Collector()
        self._engine.start(self._collector.collect)

    def run(self, prefix: str, trace: str = "") -> None:
        self._collector.run(self._engine, [replace(request, trace=trace) for request in some_requests(prefix)])


def test_members_are_seen_as_any_worker_that_sends_rows(make: Callable[[Partition], Cluster]) -> None:
    cluster = make(WIDE)
    Served(cluster).run("r")
    found = seen(cluster)
    assert found.labels("dispatch_rows_total", "worker") == cluster.stages.keys()
    assert found.labels("dispatch_rows_total", "group") == {"attention-0"}
    for stage in ("0", "1"):
        for rank in ("0", "1"):
            place = {"worker": f"attention-0-stage-{stage}-rank-{rank}", "stage": stage, "rank": rank}
            assert (found.value("dispatch_rows_total", host="expert-0", **place) or 0) > 0
            assert (found.value("stage_parts_total", **place) or 0) > 0
            busy_s = found.value("stage_busy_seconds_total", **place) or 0.0
            assert busy_s > (found.value("attention_wait_on_experts_seconds_total", **place) or 0.0) > 0
    rows_sent = sum(found.all("dispatch_rows_total", group="attention-0"))
    wait_until(lambda: sum(cluster.expert_host.load_now().rows.values()) == rows_sent)  # it counts when it has answered
    assert sum(found.all("stage_starved_seconds_total", stage="0")) < sum(
        found.all("stage_starved_seconds_total", stage="1")
    ), "only the second stage waits for rows"


def test_counters_go_on_with_the_next_formation_and_begin_anew_with_a_new_process(
    make: Callable[[Partition], Cluster],
) -> None:
    cluster = make(Partition(num_stages=2))
    served = Served(cluster)
    served.run("r")
    before = readings(cluster)
    cluster.form(2)
    for name, reading in readings(cluster).items():
        assert reading == before[name], "being formed anew computes nothing and forgets nothing"
    served.run("again")
    for name, reading in readings(cluster).items():
        assert reading.parts > before[name].parts
        assert reading.busy_s > before[name].busy_s
        assert reading.dispatch.host_rows["expert-0"] > before[name].dispatch.host_rows["expert-0"]
    name = "attention-0-stage-1-rank-0"
    cluster.plain(name).close()
    cluster.start(cluster.stages[name])
    assert cluster.plain(name).reading().parts == 0


def test_a_member_that_has_not_loaded_has_nothing_to_tell(make: Callable[[Partition], Cluster]) -> None:
    cluster = make(Partition(num_stages=2))
    stage = next(iter(cluster.stages.values()))
    assert stage.role is Role.STAGE
    with pytest.raises(UnavailableError, match="has not loaded"):
        cluster.fresh(stage).reading()


def spans(exported: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exported.get_finished_spans() if span.name == name]


def identity(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def parent(span: ReadableSpan) -> int:
    assert span.parent is not None
    return int(span.parent.span_id)


def said(span: ReadableSpan) -> dict[str, Any]:
    return {name.removeprefix("llama4_dist."): value for name, value in (span.attributes or {}).items()}


def test_a_traced_step_shows_what_each_member_did(
    make: Callable[[Partition], Cluster], exported: InMemorySpanExporter
) -> None:
    cluster = make(WIDE)
    Served(cluster).run("r", TRACE)
    assert readings(cluster)
    steps = {identity(span): said(span) for span in spans(exported, "engine.step")}
    parts = spans(exported, "stage.part")
    assert {f"{part.context.trace_id:032x}" for part in parts if part.context} == {"ab" * 16}
    assert steps
    assert {parent(part) for part in parts} == steps.keys(), "each is a child of its step"
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        own = [part for part in parts if (said(part)["stage"], said(part)["rank"]) == place]
        assert {said(part)["layers"] for part in own} == {("0-1", "2-3")[place[0]]}
        for step, told in steps.items():
            of_step = [said(part) for part in own if parent(part) == step]
            assert {part["step"] for part in of_step} == {told["step"]}
            assert sum(part["rows"] for part in of_step) == told["tokens"]


def test_a_traced_part_shows_its_expert_hosts(
    make: Callable[[Partition], Cluster], exported: InMemorySpanExporter
) -> None:
    cluster = make(WIDE)
    Served(cluster).run("r", TRACE)
    rows_sent = sum(sum(one.dispatch.host_rows.values()) for one in readings(cluster).values())
    parts = spans(exported, "stage.part")
    for part in parts:
        assert 0 <= said(part)["dispatch_wait_s"] <= ((part.end_time or 0) - (part.start_time or 0)) / 1e9 + 1e-3
    events = [event for part in parts for event in part.events]
    assert {event.name for event in events} == {"expert_host"}
    hosts: list[dict[str, Any]] = [dict(event.attributes or {}) for event in events]
    assert {one["llama4_dist.host"] for one in hosts} == {"expert-0"}
    assert sum(one["llama4_dist.rows"] for one in hosts) == rows_sent, "every step was traced"
    assert min(one["llama4_dist.reply_s"] for one in hosts) > 0


def test_members_make_no_span_of_a_step_that_nobody_traces(
    make: Callable[[Partition], Cluster], exported: InMemorySpanExporter
) -> None:
    cluster = make(Partition(num_stages=2))
    Served(cluster).run("r", TRACE[:-1] + "0")
    assert readings(cluster)
    assert not exported.get_finished_spans()
