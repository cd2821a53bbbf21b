"""Attention groups of several processes over Ray: the tokens of one process, through deaths of any of them."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from cluster.observe.collector import ClusterCollector
from cluster.ray_engine import RayEngine
from cluster.worker import Role, State, WorkerStatus
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError
from llama4_dist.gateway.observe.engine_collector import EngineCollector
from llama4_dist.gateway.observe.merged import Merged
from llama4_dist.partition import Partition
from llama4_dist.request import EngineRequest
from llama4_dist.telemetry.settings import Telemetry
from tests.cluster.running import Collector, Tokens, some_requests
from tests.scraping import Scrape
from tests.telemetry.collector import Collected, Span, collecting
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

OPTIONS = EngineOptions(num_blocks=200, max_num_seqs=8)
WIDE = Partition(num_stages=2, num_ranks=2)
GROUP = "attention-0"
TRACE = "ab" * 16


def reference(model_dir: Path, requests: list[EngineRequest], partition: Partition, slices: int = 1) -> Tokens:
    """What one process says whose members are threads; it is judged against transformers elsewhere."""
    engine = build_single_process(model_dir, partition=partition, expert_slices=slices, num_threads=1, options=OPTIONS)
    collector = Collector()
    engine.start(collector.collect)
    try:
        return collector.run(engine, requests)
    finally:
        engine.close()


def statuses(engine: RayEngine) -> dict[str, WorkerStatus]:
    return {worker.worker: worker for worker in engine.status()}


def formation_of(engine: RayEngine) -> int:
    """The number that all of the group are in; 0 while they are not in the same."""
    numbers = {one.formation for one in engine.status() if one.group == GROUP}
    present = {one.worker for one in engine.status() if one.group == GROUP and one.state is State.READY}
    return numbers.pop() if len(numbers) == 1 and len(present) > 1 else 0


@pytest.mark.parametrize("cut", [(2, 1), (1, 2)], ids=str)
def test_a_group_gives_the_tokens_of_one_process(model_dir: Path, cut: tuple[int, int]) -> None:
    partition = Partition(num_stages=cut[0], num_ranks=cut[1])
    requests = some_requests("r")
    engine = RayEngine(
        model_dir, num_expert_hosts=1, num_replicas=1, partition=partition, options=OPTIONS, num_threads=1
    )
    try:
        collector = Collector()
        engine.start(collector.collect)
        assert collector.run(engine, requests) == reference(model_dir, requests, partition)
        workers = statuses(engine)
        members = [one for one in workers.values() if one.role is Role.STAGE]
        assert sorted((one.stage, one.rank) for one in members) == list(partition.places)
        assert {one.layers for one in members if one.stage == 0} == {(0, 4 // cut[0])}
        assert {one.formation for one in (*members, workers[GROUP])} == {1}
        assert engine.stats().kv_blocks_free == 200
        local = build_single_process(model_dir, partition=partition, options=OPTIONS, num_threads=1)
        local.start(lambda outputs: None)
        assert torch.equal(engine.score(range(40)), local.score(range(40)))
        local.close()
    finally:
        engine.close()


def test_a_model_that_cannot_be_cut_so_is_refused_before_a_process_starts(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="num_ranks=3 does not divide num_heads"):
        RayEngine(model_dir, num_expert_hosts=1, partition=Partition(num_ranks=3))


class Stream:
    """Requests that run while somebody is struck."""

    def __init__(self, engine: RayEngine, collector: Collector, model_dir: Path, prefix: str) -> None:
        self._collector = collector
        self._requests = some_requests(prefix, max_tokens=60)
        self._expected = reference(model_dir, self._requests, WIDE, slices=2)
        for request in self._requests:
            engine.submit(request)
        collector.wait_for_tokens(f"{prefix}0", 2)

    def check(self) -> None:
        """Wait for all, and find the tokens of one process."""
        names = [request.request_id for request in self._requests]
        self._collector.wait_for(names)
        assert {name: self._collector.last[name].error for name in names} == dict.fromkeys(names)
        assert {name: tuple(self._collector.tokens[name]) for name in names} == self._expected


@pytest.fixture(scope="module")
def collected() -> Iterator[Collected]:
    with collecting() as collected:
        yield collected


@pytest.fixture(scope="module")
def cluster(model_dir: Path, ray_session: None, collected: Collected) -> Iterator[tuple[RayEngine, Collector]]:
    engine = RayEngine(
        model_dir,
        num_expert_hosts=2,
        num_replicas=2,
        expert_slices=2,
        partition=WIDE,
        options=OPTIONS,
        num_threads=1,
        replay_timeout_s=120.0,
        telemetry=Telemetry(trace_endpoint=collected.endpoint),
    )
    collector = Collector()
    engine.start(collector.collect)
    yield engine, collector
    engine.close()


def seen(engine: RayEngine) -> Scrape:
    """What the driver exports."""
    of_cluster = ClusterCollector(engine.control.reading, engine.control.head_answers, fresh_s=0.0)
    return Scrape(Merged([EngineCollector(engine), of_cluster]).collect())


def test_a_trace_and_the_counters_show_what_each_member_did(
    cluster: tuple[RayEngine, Collector], collected: Collected
) -> None:
    engine, collector = cluster
    (request,) = some_requests("traced", count=1)
    collector.run(engine, [replace(request, trace=f"00-{TRACE}-{'cd' * 8}-01")])
    members = {one.worker: one for one in engine.status() if one.role is Role.STAGE}
    assert len(members) == 4

    def parts() -> list[Span]:
        return collected.of(TRACE, "stage.part")

    collected.wait_for(TRACE, "engine.step")
    (step,) = collected.of(TRACE, "engine.step")  # one a second
    wait_until(lambda: {part.instance for part in parts()} == members.keys())
    assert {part.parent_id for part in parts()} == {step.span_id}
    for part in parts():
        member = members[part.instance]
        first, stop = member.layers
        assert (part.attributes["stage"], part.attributes["rank"]) == (member.stage, member.rank)
        assert part.attributes["layers"] == f"{first}-{stop - 1}"
        assert part.attributes["rows"] > 0
    assert {said["host"] for part in parts() for _, said in part.events} <= {"expert-0", "expert-1"}
    found = seen(engine)
    assert found.labels("dispatch_rows_total", "worker") == members.keys(), "the leader sends none"
    assert found.labels("dispatch_rows_total", "group") == {GROUP}
    assert found.labels("stage_parts_total", "worker") == members.keys()
    assert min(found.all("stage_busy_seconds_total")) > 0
    computed = sum(found.all("expert_worker_tokens_total"))
    assert 0 < sum(found.all("dispatch_rows_total", group=GROUP)) <= computed


def test_hedges_of_members_are_counted_by_the_host_that_stood_still(
    cluster: tuple[RayEngine, Collector], model_dir: Path
) -> None:
    engine, collector = cluster
    stream = Stream(engine, collector, model_dir, "slow/")
    before = sum(seen(engine).all("dispatch_hedged_rows_total", host="expert-1"))
    pid = statuses(engine)["expert-1"].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: sum(seen(engine).all("dispatch_hedged_rows_total", host="expert-1", group=GROUP)) > before)
    finally:
        os.kill(pid, signal.SIGCONT)
    stream.check()


@pytest.mark.parametrize("victim", ["expert-1", f"{GROUP}-stage-0-rank-1", f"{GROUP}-stage-1-rank-0", GROUP], ids=str)
def test_whoever_dies_costs_no_token(cluster: tuple[RayEngine, Collector], model_dir: Path, victim: str) -> None:
    engine, collector = cluster
    before, number = statuses(engine), formation_of(engine)
    assert number > 0
    stream = Stream(engine, collector, model_dir, f"{victim}/")
    os.kill(before[victim].pid, signal.SIGKILL)
    stream.check()

    def is_whole() -> bool:
        now = statuses(engine).get(victim)
        return now is not None and now.state is State.READY and now.pid != before[victim].pid

    wait_until(is_whole)
    wait_until(lambda: formation_of(engine) > 0)
    now = statuses(engine)
    if victim.startswith(GROUP):
        assert formation_of(engine) > number
    else:
        assert formation_of(engine) == number, "an expert host is not of the group"
    members = {name for name, one in now.items() if one.role is Role.STAGE}
    wait_until(lambda: seen(engine).labels("dispatch_rows_total", "worker") == members)
    stayed = {name for name, one in before.items() if name != victim and one.pid == now[name].pid}
    assert stayed == before.keys() - {victim}, "somebody else was started anew"
    Stream(engine, collector, model_dir, f"{victim}/later/").check()


def test_a_member_that_stands_still_is_replaced(cluster: tuple[RayEngine, Collector], model_dir: Path) -> None:
    engine, collector = cluster
    victim = f"{GROUP}-stage-1-rank-1"
    before, number = statuses(engine), formation_of(engine)
    stream = Stream(engine, collector, model_dir, "still")
    os.kill(before[victim].pid, signal.SIGSTOP)
    wait_until(lambda: (now := statuses(engine).get(victim)) and now.pid not in (0, before[victim].pid))
    wait_until(lambda: formation_of(engine) > number)
    stream.check()
    wait_until(lambda: not psutil.pid_exists(before[victim].pid))
