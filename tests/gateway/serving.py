"""Runs a gateway in a thread with its own event loop, so that blocking and asyncio tests use it alike."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from prometheus_client.registry import Collector

from llama4_dist.engine.port import Engine
from llama4_dist.gateway.run import Gateway, running_gateway
from llama4_dist.gateway.server import NO_SERVICES, Services
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.text.tokenizer import Tokenizer
from tests.loop_thread import OnLoop, in_loop_thread


def byte_tokenizer() -> Tokenizer:
    """Token b is the byte b, then Llama 4's special tokens; text of any kind encodes to its UTF-8."""
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>")
    special_tokens = {name: 256 + place for place, name in enumerate(names)}
    return Tokenizer([bytes([byte]) for byte in range(256)], special_tokens, lambda text: list(text.encode()))


@dataclass(frozen=True, kw_only=True)
class Served(OnLoop):
    """A gateway in its thread."""

    address: str
    gateway: Gateway

    def num_tasks(self) -> int:
        async def count() -> int:
            return len(asyncio.all_tasks())

        return int(self.run(count()))


@contextmanager
def serving(
    engine: Engine,
    tokenizer: Tokenizer | None = None,
    settings: GatewaySettings | None = None,
    address: str = "127.0.0.1:0",
    extra_services: Services = NO_SERVICES,
    collectors: Sequence[Collector] = (),
) -> Iterator[Served]:
    """Serve while inside, on a free loopback port unless `address` is given."""
    settings = replace(settings or GatewaySettings(), address=address)
    gateway = running_gateway(engine, tokenizer, settings, extra_services=extra_services, collectors=collectors)
    try:
        with in_loop_thread(gateway, "gateway") as (running, loop):
            yield Served(address=f"127.0.0.1:{running.port}", gateway=running, loop=loop)
    finally:
        engine.close()
