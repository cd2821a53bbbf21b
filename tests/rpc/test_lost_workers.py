"""Attention workers that are killed, stopped and resumed: every request goes on, each token comes once."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llama4_dist.engine.group import EngineGroup
from llama4_dist.engine.local import LocalEngine
from llama4_dist.engine.port import EngineStats, is_last
from llama4_dist.errors import UnavailableError
from llama4_dist.request import FinishReason, TokenOutput
from llama4_dist.rpc import engine_wire as wire
from llama4_dist.rpc import run_call
from llama4_dist.rpc.remote_engine import RemoteEngine
from llama4_dist.rpc.run_call import RunCall
from tests.engine.collector import Collector
from tests.engine.fake_model import fake_core, greedy, tokens
from tests.engine.sequences import request
from tests.rpc.worker_process import SECRET, ServingProcess, Spares, spawn_worker, worker_process
from tests.waiting import wait_until

PROMPT = (5, 9)
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 3, "frequency_penalty": 0.5}


class Cluster:
    """A group over worker processes."""

    def __init__(self, resources: ExitStack, spares: Spares, count: int) -> None:
        self.workers = [spares.take() for _ in range(count)]
        for worker in self.workers:
            resources.callback(spares.give_back, worker)
        self.engines = [RemoteEngine(worker.address, secret=SECRET) for worker in self.workers]
        self.group, self.collector = EngineGroup(self.engines), Collector()
        resources.callback(self.group.close)
        self.group.start(self.collector)

    def said(self, request_id: str, count: int) -> None:
        self.collector.wait(lambda: len(tokens(self.collector.outputs.get(request_id, []))) >= count)

    def holder(self, request_id: str) -> int:
        return next(index for index, engine in enumerate(self.engines) if request_id in engine._running)

    def end(self) -> list[int]:
        return tokens(self.collector.wait_for("r"))


@pytest.fixture(scope="module")
def spares() -> Iterator[Spares]:
    spares = Spares(spawn_worker, 2)
    yield spares
    spares.close()


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def stats_of(worker: ServingProcess) -> EngineStats:
    """Ask over a connection of its own."""
    engine = RemoteEngine(worker.address, secret=SECRET)
    stats = engine.stats()
    engine.close()
    return stats


def is_idle(worker: ServingProcess) -> bool:
    """Whether a worker holds no KV block."""
    stats = stats_of(worker)
    return (stats.requests_running, stats.kv_blocks_free) == (0, stats.kv_blocks_total)


def undisturbed(**sampling: float) -> list[int]:
    engine, collector = LocalEngine(fake_core(num_blocks=256, max_context=512)), Collector()
    engine.start(collector)
    engine.submit(request("r", PROMPT, max_tokens=60, **sampling))
    outputs = collector.wait_for("r")
    engine.close()
    return tokens(outputs)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("num_before", [0, 1, 25])
def test_a_killed_workers_requests_go_on_with_another(
    resources: ExitStack, spares: Spares, sampling: dict[str, float], num_before: int
) -> None:
    cluster = Cluster(resources, spares, 2)
    cluster.group.submit(request("r", PROMPT, max_tokens=60, logprobs=1, **sampling))
    cluster.said("r", num_before)
    holder = cluster.holder("r")
    killed_s = time.monotonic()
    cluster.workers[holder].signal(signal.SIGKILL)
    before = len(tokens(cluster.collector.outputs.get("r", [])))
    cluster.said("r", before + 2)
    assert time.monotonic() - killed_s < 1.0
    assert cluster.end() == undisturbed(**sampling)
    outputs = cluster.collector.outputs["r"]
    assert [one.token.token_id for output in outputs for one in output.logprobs or ()] == tokens(outputs)
    assert cluster.group.stats().requests_replayed == 1
    assert is_idle(cluster.workers[1 - holder])
    with pytest.raises(UnavailableError):
        cluster.engines[holder].stats()


def test_a_stopped_workers_requests_go_on_and_its_later_words_are_not_heard(
    resources: ExitStack, spares: Spares
) -> None:
    cluster = Cluster(resources, spares, 2)
    cluster.group.submit(request("r", PROMPT, max_tokens=400))
    cluster.said("r", 10)
    holder = cluster.holder("r")
    num_cancelled = stats_of(cluster.workers[holder]).requests_cancelled
    cluster.workers[holder].signal(signal.SIGSTOP)
    stopped_s = time.monotonic()
    wait_until(lambda: "r" in cluster.engines[1 - holder]._running)
    assert 0.9 < time.monotonic() - stopped_s < 2.0
    cluster.workers[holder].signal(signal.SIGCONT)
    wait_until(lambda: stats_of(cluster.workers[holder]).requests_cancelled == num_cancelled + 1, timeout_s=5.0)
    assert cluster.end() == greedy(PROMPT, 400)
    wait_until(lambda: not cluster.engines[holder]._down)


def test_what_a_given_up_stream_still_says_is_not_heard(resources: ExitStack, spares: Spares) -> None:
    cluster = Cluster(resources, spares, 1)
    engine = cluster.engines[0]
    given_up = engine._call
    assert given_up is not None
    given_up.cut()
    wait_until(lambda: engine._call not in (None, given_up))
    late = TokenOutput(request_id="r", token_ids=(1,), queue_s=0.0)
    engine._on_outputs = lambda outputs: heard.extend(outputs)
    heard: list[TokenOutput] = []
    engine._hear(given_up, wire.outputs_to_wire([late]))
    assert heard == []
    engine._hear(engine._call, wire.outputs_to_wire([late]))  # type: ignore[arg-type]
    assert heard == [late]


def test_time_in_which_this_process_stands_still_is_no_silence_of_the_worker() -> None:
    """A reader that could not run has not read what came."""
    call = RunCall(cast(Any, SilentStub()), (), lambda call, message: None)
    call.num_heard = 1
    stalls = iter([0.0, 0.1, 20.0, 20.1, 20.2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_call, "time", SimpleNamespace(monotonic=lambda: next(stalls)))
        patch.setattr(call._ended, "wait", lambda timeout_s: False)
        with pytest.raises(StopIteration):  # the clock ran out before the worker was given up
            call.watch(silence_timeout_s=1.0, first_timeout_s=1.0)


class SilentStub:
    """A service whose stream gives nothing."""

    def Run(self, commands: object, metadata: object) -> object:
        return iter(())


def test_the_only_worker_is_returned_to_and_computes_nothing_twice(resources: ExitStack, spares: Spares) -> None:
    cluster = Cluster(resources, spares, 1)
    before = stats_of(cluster.workers[0])
    cluster.group.submit(request("r", PROMPT, max_tokens=200))
    cluster.said("r", 10)
    cluster.workers[0].signal(signal.SIGSTOP)
    wait_until(lambda: bool(cluster.engines[0]._down))
    asked_s = time.monotonic()
    with pytest.raises(UnavailableError):
        cluster.engines[0].stats()
    assert time.monotonic() - asked_s < 1.0, "it waited for an answer that cannot come"
    cluster.workers[0].signal(signal.SIGCONT)
    assert cluster.end() == greedy(PROMPT, 200)
    after = cluster.engines[0].stats()
    assert after.requests_admitted == before.requests_admitted + 1
    assert after.generated_tokens == before.generated_tokens + 200


def test_a_worker_of_a_new_process_takes_what_waits(resources: ExitStack, spares: Spares) -> None:
    cluster = Cluster(resources, spares, 1)
    cluster.group.submit(request("r", PROMPT, max_tokens=60))
    cluster.said("r", 10)
    cluster.workers[0].signal(signal.SIGKILL)
    wait_until(lambda: bool(cluster.engines[0]._down))
    successor = spares.take()
    resources.callback(spares.give_back, successor)
    cluster.group.remove("engine-0")
    cluster.group.add(RemoteEngine(successor.address, secret=SECRET), name="successor")
    assert cluster.end() == greedy(PROMPT, 60)


def test_a_worker_that_comes_back_at_its_address_is_found(resources: ExitStack, spares: Spares) -> None:
    cluster = Cluster(resources, spares, 1)
    cluster.group.submit(request("r", PROMPT, max_tokens=60))
    cluster.said("r", 10)
    cluster.workers[0].signal(signal.SIGKILL)
    port = int(cluster.workers[0].address.rpartition(":")[2])
    resources.enter_context(worker_process(port=port))
    assert cluster.end() == greedy(PROMPT, 60)


def test_a_kill_storm_loses_and_doubles_nothing(resources: ExitStack, spares: Spares) -> None:
    """Sixteen requests on two workers, which are killed and replaced one after the other, twice."""
    cluster, successors = Cluster(resources, spares, 2), [spares.take() for _ in range(3)]
    for successor in successors:
        resources.callback(spares.give_back, successor)
        assert successor.address
    names = [f"r{index}" for index in range(16)]
    for index, name in enumerate(names):
        cluster.group.submit(request(name, (5, index), max_tokens=80))
    workers = dict(zip(cluster.group.names, cluster.workers, strict=True))
    for index, successor in enumerate(successors):
        cluster.said("r0", 15 * (index + 1))
        name = next(iter(workers))
        workers.pop(name).signal(signal.SIGKILL)
        cluster.group.remove(name)
        workers[f"new-{index}"] = successor
        cluster.group.add(RemoteEngine(successor.address, secret=SECRET), name=f"new-{index}")
    cluster.collector.wait_for(*names)
    for index, name in enumerate(names):
        outputs = cluster.collector.outputs[name]
        assert tokens(outputs) == greedy((5, index), 80)
        assert [is_last(output) for output in outputs].count(True) == 1
    assert cluster.group.stats().requests_replayed >= 16
    wait_until(lambda: all(is_idle(worker) for worker in workers.values()))


def test_cancelling_frees_the_cache_at_once_and_closing_leaves_no_thread(resources: ExitStack, spares: Spares) -> None:
    threads = set(threading.enumerate())
    cluster = Cluster(resources, spares, 2)
    cluster.group.submit(request("r", PROMPT, max_tokens=400))
    cluster.said("r", 5)
    cluster.group.abort("r")
    assert cluster.collector.wait_for("r")[-1].finish_reason is FinishReason.CANCELLED
    assert all(is_idle(worker) for worker in cluster.workers)
    cluster.group.submit(request("q", PROMPT, max_tokens=400))
    cluster.said("q", 5)
    holder = cluster.holder("q")
    cluster.group.close()
    wait_until(lambda: is_idle(cluster.workers[holder]), timeout_s=2.0)  # a goodbye aborts; nothing waits to be resumed
    ours = lambda: {one.name for one in set(threading.enumerate()) - threads if one.name.startswith("engine")}  # noqa: E731
    wait_until(lambda: not ours())
