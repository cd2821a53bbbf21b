"""Gateways are killed at any moment: a client's stream goes on at the next one, token for token as if nothing was."""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llama4_dist.client import AsyncClient, Client, ConnectOptions, Delta
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.group import EngineGroup
from llama4_dist.engine.local import LocalEngine
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import EngineError, UnavailableError
from llama4_dist.gateway.engine_ids import engine_id_key
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.request import Completion, Sampling
from llama4_dist.rpc.engine_service import EngineServer
from llama4_dist.rpc.remote_engine import RemoteEngine
from llama4_dist.text.tokenizer import load_tokenizer
from tests.checkpoints import make_checkpoint
from tests.engine.collector import Collector
from tests.engine.fake_model import fake_core, tokens
from tests.engine.sequences import request
from tests.gateway.gateway_process import spawn_gateway
from tests.gateway.serving import Served, serving
from tests.rpc.worker_process import SECRET, ServingProcess, Spares, spawn_worker
from tests.tokenizers_tiny import make_tokenizer
from tests.waiting import wait_until

PROMPT = "the user asks"
GREEDY = Sampling(temperature=0, max_tokens=80, ignore_eos=True)
SEEDED = Sampling(temperature=0.9, top_p=0.95, seed=11, max_tokens=80, ignore_eos=True, n=2, logprobs=2)
UNSEEDED = Sampling(temperature=0.9, max_tokens=80, ignore_eos=True, prompt_logprobs=1)


class Worker:
    """An attention worker of this process whose steps can be slowed and held."""

    def __init__(self, engine: LocalEngine, ttl_s: float = 10.0) -> None:
        self.engine, self.step_s = engine, 0.0
        self.go = threading.Event()
        self.go.set()
        forward = engine.core.runner.model.forward

        def paced(*arguments: object) -> object:
            time.sleep(self.step_s)  # stands for a larger model
            assert self.go.wait(60)
            return forward(*arguments)  # type: ignore[arg-type]

        engine.core.runner.model.forward = paced  # type: ignore[method-assign, assignment]
        self.server = EngineServer(engine, host="127.0.0.1", secret=SECRET, resume_ttl_s=ttl_s)

    @property
    def is_idle(self) -> bool:
        stats = self.engine.stats()
        return stats.kv_blocks_free == stats.kv_blocks_total and stats.requests_running == 0

    def close(self) -> None:
        self.go.set()
        self.server.close(grace_s=0)
        self.engine.close()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"), "scout")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def worker(model_dir: Path) -> Iterator[Worker]:
    options = EngineOptions(model_name="tiny", max_num_seqs=64, num_blocks=1024, block_size=16, max_context=512)
    worker = Worker(build_single_process(model_dir, num_threads=1, options=options))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def survivor(worker: Worker, model_dir: Path) -> Iterator[Served]:
    group = EngineGroup([RemoteEngine(worker.server.address, secret=SECRET)])
    settings = GatewaySettings(engine_id_key=engine_id_key(SECRET))
    with serving(group, load_tokenizer(model_dir), settings) as served:
        yield served


@pytest.fixture(scope="module")
def victims(worker: Worker, model_dir: Path) -> Iterator[Spares]:
    spares = Spares(lambda: spawn_gateway(worker.server.address, model_dir=model_dir), 1)
    yield spares
    spares.close()


@pytest.fixture
def victim(worker: Worker, victims: Spares) -> Iterator[ServingProcess]:
    victim = victims.take()
    assert victim.address
    yield victim
    victims.give_back(victim)
    worker.go.set()
    worker.step_s = 0.0
    wait_until(lambda: worker.is_idle)


def fault_free(survivor: Served, sampling: Sampling, seed: int | None = None) -> Completion:
    with Client(survivor.address) as client:
        return client.generate(PROMPT, replace(sampling, seed=sampling.seed if seed is None else seed))


def joined(deltas: list[Delta], index: int) -> tuple[str, tuple[int, ...]]:
    mine = [delta for delta in deltas if delta.index == index]
    return "".join(delta.text for delta in mine), tuple(token for delta in mine for token in delta.token_ids)


def assert_same(deltas: list[Delta], completion: Completion, expected: Completion) -> None:
    for output in expected.outputs:
        assert joined(deltas, output.index) == (output.text, output.token_ids)
    assert completion.outputs == expected.outputs
    assert completion.usage == expected.usage
    assert completion.prompt_logprobs == expected.prompt_logprobs
    assert completion.prompt_token_ids == expected.prompt_token_ids


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("num_before", [1, 30])
def test_a_stream_goes_on_at_the_next_gateway(
    worker: Worker, survivor: Served, victim: ServingProcess, sampling: Sampling, num_before: int
) -> None:
    expected = fault_free(survivor, sampling)
    worker.step_s = 0.01
    before = worker.engine.stats()
    with Client(f"{victim.address},{survivor.address}") as client:
        stream = client.stream_generate(PROMPT, sampling)
        deltas: list[Delta] = []
        for delta in stream:
            deltas.append(delta)
            if len(deltas) == num_before:
                victim.signal(signal.SIGKILL)
    assert_same(deltas, stream.completion, expected)
    after = worker.engine.stats()
    assert after.requests_admitted - before.requests_admitted == sampling.n, "something was computed again"


def test_the_stream_of_an_unseeded_request_with_a_stop_string_goes_on_in_async_clients(
    worker: Worker, survivor: Served, victim: ServingProcess
) -> None:
    import asyncio

    async def run(sampling: Sampling) -> tuple[list[Delta], Completion]:
        async with AsyncClient([victim.address, survivor.address]) as client:
            stream = client.stream_generate(PROMPT, sampling)
            deltas: list[Delta] = []
            async for delta in stream:
                deltas.append(delta)
                if len(deltas) == 20:
                    victim.signal(signal.SIGKILL)
            return deltas, stream.completion

    whole = fault_free(survivor, replace(GREEDY, prompt_logprobs=1))
    stop = whole.text[-12:-9]
    sampling = replace(GREEDY, prompt_logprobs=1, stop=(stop,))
    expected = fault_free(survivor, sampling)
    assert len(whole.token_ids) > len(expected.token_ids) > 20
    worker.step_s = 0.01
    deltas, completion = asyncio.run(run(sampling))
    assert_same(deltas, completion, expected)
    assert completion.outputs[0].stop_reason == stop


def test_a_gateway_that_dies_before_the_first_token_costs_nothing(
    worker: Worker, survivor: Served, victim: ServingProcess
) -> None:
    expected = fault_free(survivor, GREEDY)
    worker.go.clear()
    with Client(f"{victim.address},{survivor.address}") as client, ThreadPoolExecutor(1) as pool:
        admitted = worker.engine.stats().requests_admitted
        stream = client.stream_generate(PROMPT, GREEDY)
        deltas = pool.submit(list, stream)
        wait_until(lambda: worker.engine.stats().requests_admitted > admitted)
        victim.signal(signal.SIGKILL)
        worker.go.set()
        assert_same(deltas.result(60), stream.completion, expected)
        assert worker.engine.stats().requests_admitted == admitted + 1


def test_a_gateway_that_dies_after_the_last_token_costs_nothing(
    worker: Worker, survivor: Served, victim: ServingProcess
) -> None:
    """It is stopped while tokens come, so that the worker ends the request and the client has not heard of it."""
    expected = fault_free(survivor, SEEDED)
    worker.step_s = 0.01
    with Client(f"{victim.address},{survivor.address}") as client:
        before = worker.engine.stats()
        stream = client.stream_generate(PROMPT, SEEDED)
        deltas = [next(iter(stream))]
        victim.signal(signal.SIGSTOP)
        wait_until(lambda: worker.engine.stats().requests_finished == before.requests_finished + 2)
        victim.signal(signal.SIGKILL)
        deltas += list(stream)
        assert_same(deltas, stream.completion, expected)
        assert worker.engine.stats().requests_admitted == before.requests_admitted + 2


def test_a_unary_call_is_answered_by_the_next_gateway_and_computed_once(
    worker: Worker, survivor: Served, victim: ServingProcess
) -> None:
    expected = fault_free(survivor, SEEDED)
    worker.step_s = 0.01
    with Client(f"{victim.address},{survivor.address}") as client, ThreadPoolExecutor(1) as pool:
        before = worker.engine.stats()
        answer = pool.submit(client.generate, PROMPT, SEEDED)
        wait_until(lambda: worker.engine.stats().generated_tokens > before.generated_tokens + 20)
        victim.signal(signal.SIGKILL)
        assert answer.result(60).outputs == expected.outputs
        assert worker.engine.stats().requests_admitted == before.requests_admitted + 2


def test_many_streams_survive_the_death_of_their_gateway(
    worker: Worker, survivor: Served, victim: ServingProcess
) -> None:
    samplings = [replace(SEEDED, seed=seed, n=1, max_tokens=40) for seed in range(24)]
    expected = [fault_free(survivor, sampling) for sampling in samplings]
    worker.step_s = 0.02
    before = worker.engine.stats()
    with Client(f"{victim.address},{survivor.address}") as client, ThreadPoolExecutor(24) as pool:
        streams = [client.stream_generate(PROMPT, sampling) for sampling in samplings]
        answers = [pool.submit(list, stream) for stream in streams]
        wait_until(lambda: worker.engine.stats().generated_tokens > before.generated_tokens + 24 * 10)
        victim.signal(signal.SIGKILL)
        for answer, stream, wanted in zip(answers, streams, expected, strict=True):
            assert_same(answer.result(60), stream.completion, wanted)


def test_a_lost_request_is_repeated_with_its_own_seed(worker: Worker, survivor: Served, victim: ServingProcess) -> None:
    """Its worker does not have it any more when the next gateway asks."""
    worker.step_s = 0.01
    with Client(f"{victim.address},{survivor.address}") as client:
        stream = client.stream_generate(PROMPT, UNSEEDED)
        deltas = []
        for delta in stream:
            deltas.append(delta)
            if len(deltas) == 20:
                victim.signal(signal.SIGSTOP)
                for request_id in list(worker.engine._live):
                    worker.engine.abort(request_id)
                wait_until(lambda: worker.is_idle)
                victim.signal(signal.SIGKILL)
        expected = fault_free(survivor, UNSEEDED, stream.seed)
        assert_same(deltas, stream.completion, expected)


def test_what_comes_out_different_when_it_is_repeated_is_refused(
    worker: Worker, survivor: Served, victim: ServingProcess
) -> None:
    worker.step_s = 0.01
    with Client(f"{victim.address},{survivor.address}") as client:
        stream = client.stream_generate(PROMPT, UNSEEDED)
        iterator = iter(stream)
        for _ in range(20):
            next(iterator)
        victim.signal(signal.SIGSTOP)
        for request_id in list(worker.engine._live):
            worker.engine.abort(request_id)
        stream._progress._seed = 5  # as if the next gateway drew otherwise
        victim.signal(signal.SIGKILL)
        with pytest.raises(EngineError, match="came out different") as caught:
            list(iterator)
        assert caught.value.reason == "REPEAT_DIVERGED"


def test_without_another_gateway_the_stream_fails_as_before_and_the_cache_is_freed() -> None:
    worker = Worker(LocalEngine(fake_core(num_blocks=256, max_context=512)), ttl_s=0.5)
    worker.step_s = 0.01
    gateway = spawn_gateway(worker.server.address)
    try:
        with Client(gateway.address, ConnectOptions(max_attempts=2)) as client:
            stream = iter(client.stream_generate([5, 9], Sampling(temperature=0, max_tokens=500)))
            next(stream)
            gateway.signal(signal.SIGKILL)
            with pytest.raises(UnavailableError):
                list(stream)
            assert not worker.is_idle
            wait_until(lambda: worker.is_idle, timeout_s=3.0)
    finally:
        gateway.close()
        worker.close()


def test_gateway_and_worker_may_die_together_and_one_after_the_other() -> None:
    """The seed is nobody's choice, and yet the same for the next gateway and the next worker."""
    sampling = Sampling(temperature=0.9, max_tokens=150, ignore_eos=True)
    with ExitStack() as resources:
        workers = [spawn_worker() for _ in range(3)]
        gateways = [spawn_gateway(*(worker.address for worker in workers)) for _ in range(3)]
        for process in (*workers, *gateways):
            resources.callback(process.close)
        client = resources.enter_context(Client([gateway.address for gateway in gateways]))
        deaths: dict[int, list[ServingProcess]] = {
            20: [gateways[0]],  # the next one finds the request
            60: [workers[0]],  # and must draw as the first did
            100: [gateways[1], workers[1]],  # of which nobody is left who knows it
        }
        received: list[int] = []
        stream = client.stream_generate([5, 9], sampling)
        for delta in stream:
            received += delta.token_ids
            for place in [place for place in deaths if len(received) >= place]:
                for process in deaths.pop(place):
                    process.signal(signal.SIGKILL)
        assert not deaths
    alone, collector = LocalEngine(fake_core(num_blocks=256, max_context=512)), Collector()
    alone.start(collector)
    alone.submit(request("r", (5, 9), **asdict(replace(sampling, seed=stream.seed))))
    assert received == tokens(collector.wait_for("r"))
    alone.close()


def test_leaving_a_stream_still_frees_its_cache_at_once(
    worker: Worker, survivor: Served, victim: ServingProcess
) -> None:
    worker.step_s = 0.01
    with Client(f"{victim.address},{survivor.address}") as client:
        stream = client.stream_generate(PROMPT, replace(GREEDY, max_tokens=400))
        next(iter(stream))
        stream.close()
        wait_until(lambda: worker.is_idle, timeout_s=1.0)
