"""The gateway over the real engine and a tiny checkpoint: exact tokens, many streams, KV freed at once."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from llama4_dist.client import AsyncClient, Client
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.local import LocalEngine
from llama4_dist.engine.options import EngineOptions
from llama4_dist.request import EngineRequest, FinishReason, Sampling, TokenOutput
from llama4_dist.text.tokenizer import load_tokenizer
from tests.checkpoints import make_checkpoint
from tests.gateway.corpus import all_cases
from tests.gateway.replay import replay
from tests.gateway.serving import Served, serving
from tests.tokenizers_tiny import make_tokenizer
from tests.waiting import wait_until

GREEDY = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
Golden = Callable[[Sequence[int], Sampling], list[tuple[int, ...]]]
SEEDED = Sampling(temperature=0.7, top_p=0.9, seed=11, max_tokens=12, ignore_eos=True, n=2)


class Watched:
    """The engine with a note of the step in which each abort was asked for and carried out."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self.asked: dict[str, int] = {}
        self.freed: dict[str, tuple[int, int]] = {}
        self.limits, self.submit, self.score = engine.limits, engine.submit, engine.score
        self.attach = engine.attach
        self.stats, self.close = engine.stats, engine.close

    def start(self, on_outputs: Callable[[Sequence[TokenOutput]], None]) -> None:
        def watch(outputs: Sequence[TokenOutput]) -> None:
            for output in outputs:
                if output.finish_reason is FinishReason.CANCELLED:
                    stats = self.stats()
                    self.freed[output.request_id] = (stats.steps, stats.kv_blocks_free)
            on_outputs(outputs)

        self._engine.start(watch)

    def abort(self, request_id: str) -> None:
        self.asked.setdefault(request_id, self.stats().steps)
        self._engine.abort(request_id)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"), "scout")
    make_tokenizer(folder)
    return folder


def build(model_dir: Path) -> LocalEngine:
    options = EngineOptions(model_name="tiny", max_num_seqs=64, num_blocks=1024, block_size=16, max_context=512)
    return build_single_process(model_dir, num_threads=1, options=options)


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Watched:
    return Watched(build(model_dir))


@pytest.fixture(scope="module")
def served(engine: Watched, model_dir: Path) -> Iterator[Served]:
    with serving(engine, load_tokenizer(model_dir)) as running:
        yield running


@pytest.fixture(scope="module")
def golden(model_dir: Path) -> Iterator[Golden]:
    """The engine's tokens without a gateway, one request at a time."""
    engine = build(model_dir)
    tokens: dict[str, list[int]] = {}
    done = threading.Semaphore(0)

    def take(outputs: Sequence[TokenOutput]) -> None:
        for output in outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                done.release()

    engine.start(take)

    def run(prompt: Sequence[int], sampling: Sampling) -> list[tuple[int, ...]]:
        tokens.clear()
        for index in range(sampling.n):
            engine.submit(
                EngineRequest(
                    request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling, sequence_index=index
                )
            )
            assert done.acquire(timeout=60)
        return [tuple(tokens[str(index)]) for index in range(sampling.n)]

    yield run
    engine.close()


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
def test_streamed_tokens_are_the_engines_own(served: Served, golden: Golden, sampling: Sampling) -> None:
    with Client(served.address) as client:
        stream = client.stream_generate("the user asks", sampling)
        text = dict.fromkeys(range(sampling.n), "")
        for delta in stream:
            text[delta.index] += delta.text
        streamed = stream.completion
        whole = client.generate("the user asks", sampling)
    expected = golden(whole.prompt_token_ids, sampling)
    assert [output.token_ids for output in whole.outputs] == expected
    assert [output.token_ids for output in streamed.outputs] == expected
    assert [output.text for output in whole.outputs] == list(text.values())


async def test_256_streams_at_once_all_finish_with_their_own_tokens(
    served: Served, engine: Watched, golden: Golden
) -> None:
    prompts = [[256, 65 + index % 8, 70 + index % 3] for index in range(256)]
    rss = psutil.Process().memory_info().rss

    async def one(client: AsyncClient, prompt: list[int]) -> tuple[int, ...]:
        return tuple([token async for delta in client.stream_generate(prompt, GREEDY) for token in delta.token_ids])

    async with AsyncClient(served.address) as client:
        received = await asyncio.gather(*(one(client, prompt) for prompt in prompts))
    alone = {tuple(prompt): golden(prompt, GREEDY)[0] for prompt in prompts[:24]}
    assert received == [alone[tuple(prompt)] for prompt in prompts]
    assert psutil.Process().memory_info().rss - rss < 128 * 1024 * 1024
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total


async def test_a_dropped_stream_frees_its_kv_within_one_step(served: Served, engine: Watched) -> None:
    engine.asked.clear()
    engine.freed.clear()
    rng = random.Random(3)
    base_tasks = await asyncio.to_thread(served.num_tasks)

    async def one(client: AsyncClient, cancel_at: int) -> None:
        stream = client.stream_generate([256, 70], Sampling(max_tokens=400, ignore_eos=True))
        num_received = 0
        async for delta in stream:
            num_received += len(delta.token_ids)
            if num_received >= cancel_at:
                await stream.close()
                return

    async with AsyncClient(served.address) as client:
        await asyncio.gather(*(one(client, rng.randrange(1, 30)) for _ in range(48)))
        await asyncio.to_thread(wait_until, lambda: len(engine.freed) == 48)
    waits = [engine.freed[request_id][0] - asked for request_id, asked in engine.asked.items()]
    assert max(waits) <= 1
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert (stats.requests_running, stats.requests_waiting) == (0, 0)
    assert served.gateway.generations.num_running == 0
    assert await asyncio.to_thread(served.num_tasks) <= base_tasks + 2


def test_logprobs_are_the_chosen_tokens(served: Served) -> None:
    with Client(served.address) as client:
        sampling = Sampling(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True)
        whole = client.generate("asks", sampling)
        stream = client.stream_generate("asks", sampling)
        list(stream)
    assert whole.logprobs is not None
    assert whole.prompt_logprobs is not None
    assert [position.token.token_id for position in whole.logprobs] == list(whole.token_ids)
    assert [position.token.rank for position in whole.logprobs] == [1] * 6
    assert [len(position.top) for position in whole.logprobs] == [3] * 6
    assert whole.prompt_logprobs[0] is None
    assert len(whole.prompt_logprobs) == len(whole.prompt_token_ids)
    assert stream.completion.outputs == whole.outputs
    assert stream.completion.prompt_logprobs == whole.prompt_logprobs


def test_no_bad_request_reaches_the_engine(served: Served, engine: Watched, golden: Golden) -> None:
    expected = golden([7, 8], Sampling(temperature=0, max_tokens=20, ignore_eos=True))[0]
    before = engine.stats()
    assert (
        replay(served, expected, lambda: engine.stats().kv_blocks_total - engine.stats().kv_blocks_free, all_cases())
        == []
    )
    assert engine.stats().requests_failed == before.requests_failed
