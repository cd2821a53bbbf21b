"""Runs a gateway in a thread with its own event loop, so that blocking and asyncio tests use it alike."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from prometheus_client.registry import Collector

from llama4_dist.engine.port import Engine
from llama4_dist.errors import Llama4Error
from llama4_dist.gateway.run import Gateway, running_gateway
from llama4_dist.gateway.server import NO_SERVICES, Services
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.text.tokenizer import Tokenizer


def byte_tokenizer() -> Tokenizer:
    """Token b is the byte b, then Llama 4's special tokens; text of any kind encodes to its UTF-8."""
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>")
    special_tokens = {name: 256 + place for place, name in enumerate(names)}
    return Tokenizer([bytes([byte]) for byte in range(256)], special_tokens, lambda text: list(text.encode()))


@dataclass(frozen=True, kw_only=True)
class Served:
    """A gateway in its thread."""

    address: str
    gateway: Gateway
    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the gateway's loop and wait."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=30)

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
    started: list[Served | BaseException] = []
    ready = threading.Event()

    async def main() -> None:
        stop = asyncio.Event()
        try:
            async with running_gateway(
                engine, tokenizer, settings, extra_services=extra_services, collectors=collectors
            ) as gateway:
                loop = asyncio.get_running_loop()
                stops.append((loop, stop))
                started.append(Served(address=f"127.0.0.1:{gateway.port}", gateway=gateway, loop=loop))
                ready.set()
                await stop.wait()
        except Llama4Error as error:
            started.append(error)  # raised again in the caller's thread
            ready.set()

    stops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    thread = threading.Thread(target=lambda: asyncio.run(main()), name="gateway", daemon=True)
    thread.start()
    if not ready.wait(timeout=20):  # no assert: this runs under `python -O` too
        raise TimeoutError("the gateway did not start")
    served = started[0]
    if isinstance(served, Llama4Error):
        raise served
    try:
        yield served
    finally:
        loop, stop = stops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=20)
        engine.close()
        if thread.is_alive():
            raise TimeoutError("the gateway did not stop")


def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Poll until the condition holds or the time is over; return whether it holds."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if condition():
            return True
        time.sleep(0.005)
    return condition()
