"""A step of many sequences is delivered in slices: the loop is never long away from its sockets."""

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack

from llama4_dist.engine.port import OnOutputs
from llama4_dist.gateway.delivery import SHARE, SLICE
from llama4_dist.gateway.engine_ids import EngineIds
from llama4_dist.gateway.generations import Generations
from llama4_dist.gateway.metrics import Metrics
from llama4_dist.gateway.running import RunningRequest
from llama4_dist.request import EngineRequest, FinishReason, Sampling, TokenOutput
from llama4_dist.rpc.wire import GenerationCall
from tests.gateway.scripted_engine import ScriptedEngine


class HandDriven(ScriptedEngine):
    """Says what the test says, when the test says it."""

    def __init__(self) -> None:
        super().__init__()
        self.listener: OnOutputs = lambda outputs: None
        self.requests: list[EngineRequest] = []

    def start(self, on_outputs: OnOutputs) -> None:
        self.listener = on_outputs

    def submit(self, request: EngineRequest) -> None:
        self.requests.append(request)


async def test_a_large_step_lets_the_loop_breathe_and_arrives_whole_and_in_order() -> None:
    engine, number = HandDriven(), 5 * SLICE
    generations = Generations(engine, None, Metrics(), EngineIds(None))
    generations.start()
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(opened(generations)) for _ in range(number)]
        engine.listener([TokenOutput(request_id=one.request_id, token_ids=(1,)) for one in engine.requests])
        engine.listener(
            [
                TokenOutput(request_id=one.request_id, token_ids=(2,), finish_reason=FinishReason.LENGTH)
                for one in engine.requests
            ]
        )
        delivered = []
        while not all(one.done for one in running):
            await asyncio.sleep(0)  # one pass of the loop
            delivered.append(sum(one.state.usage.completion_tokens for one in running))
        assert delivered[-1] == 2 * number
        passes = [after - before for before, after in zip([0, *delivered], delivered, strict=False)]
        assert max(passes) <= SLICE
        assert len([one for one in passes if one]) == 2 * number / SLICE
        assert all(one.state.completion().outputs[0].token_ids == (1, 2) for one in running)


async def test_steps_that_come_faster_than_they_go_do_not_pile_up() -> None:
    """A sixteenth of what waits goes in each pass, so what waits cannot exceed sixteen times what comes in one."""
    engine = HandDriven()
    generations = Generations(engine, None, Metrics(), EngineIds(None))
    generations.start()
    number, num_steps = 4 * SLICE, 400
    async with AsyncExitStack() as stack:
        opening = [opened(generations, num_tokens=num_steps + 1) for _ in range(number)]
        running = [await stack.enter_async_context(one) for one in opening]
        for _ in range(num_steps):  # four times what a pass takes at the least
            engine.listener([TokenOutput(request_id=one.request_id, token_ids=(1,)) for one in engine.requests])
            await asyncio.sleep(0)
        num_delivered = sum(one.state.usage.completion_tokens for one in running)
        assert number * num_steps - num_delivered <= SHARE * 2 * number


async def test_every_reader_that_waits_is_woken_and_one_that_left_is_not_missed() -> None:
    engine = HandDriven()
    generations = Generations(engine, None, Metrics(), EngineIds(None))
    generations.start()
    async with opened(generations) as running:
        readers = [asyncio.create_task(running.changed()) for _ in range(3)]
        await asyncio.sleep(0)
        readers[1].cancel()
        engine.listener([TokenOutput(request_id=engine.requests[0].request_id, token_ids=(1,))])
        _, waiting = await asyncio.wait(readers, timeout=5.0)
        assert not waiting
        assert [reader.cancelled() for reader in readers] == [False, True, False]


def opened(generations: Generations, num_tokens: int = 2) -> AbstractAsyncContextManager[RunningRequest]:
    call = GenerationCall(model="", request_id="", prompt=(1, 2), sampling=Sampling(max_tokens=num_tokens))
    return generations.open(call, tenant="", body=b"", timeout_s=60.0)
