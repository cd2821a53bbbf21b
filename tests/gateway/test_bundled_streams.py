"""256 real prompts at once through a real gateway over the bundled model: none lost, each with its own text."""

import asyncio
from pathlib import Path

import psutil

from llama4_dist.client import AsyncClient
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.request import Completion, Sampling
from llama4_dist.text.tokenizer import load_tokenizer
from tests.gateway.serving import serving

FOLDER = Path(__file__).parents[2] / "models" / "llama4-mini"
PROMPTS = (
    "In the beginning",
    "Call me Ishmael.",
    "The whale",
    "Fellow-Citizens of the Senate",
    "It is a truth universally acknowledged, that a single man",
    "The captain looked at the sea, and",
    "And the Lord spake unto Moses, saying,",
    "My dear sister,",
)
NUM_STREAMS, NUM_ALONE = 256, 12
MAX_GROWTH_BYTES = 256 * 1024 * 1024


def sampling(index: int) -> Sampling:
    return Sampling(temperature=0.8, top_p=0.95, seed=index, max_tokens=24)


async def stream(client: AsyncClient, index: int) -> Completion:
    opened = client.stream_generate(PROMPTS[index % len(PROMPTS)], sampling(index))
    text = ""
    async for delta in opened:
        text += delta.text
    assert text == opened.completion.text
    return opened.completion


async def test_256_streams_complete_none_lost_and_each_reads_as_it_would_alone() -> None:
    engine = build_single_process(
        FOLDER, dtype="float32", options=EngineOptions(model_name="mini", num_blocks=2048), num_threads=1
    )
    try:
        with serving(engine, load_tokenizer(FOLDER)) as served:
            async with AsyncClient(served.address) as client:
                alone = [await stream(client, index) for index in range(NUM_ALONE)]
                before = psutil.Process().memory_info().rss
                together = await asyncio.gather(*(stream(client, index) for index in range(NUM_STREAMS)))
                growth = psutil.Process().memory_info().rss - before
            stats = engine.stats()
    finally:
        engine.close()
    assert [one.token_ids for one in together[:NUM_ALONE]] == [one.token_ids for one in alone]
    assert all(one.usage.completion_tokens > 0 and one.text.strip() for one in together)
    assert len({one.text for one in together}) > NUM_STREAMS * 0.9, "seeds must give texts of their own"
    assert stats.requests_finished == NUM_STREAMS + NUM_ALONE
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert growth < MAX_GROWTH_BYTES
