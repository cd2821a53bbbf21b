"""Runs a service in a thread with an event loop of its own, so that blocking and asyncio tests use it alike."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from llama4_dist.errors import Llama4Error
from tests.waiting import PATIENCE_S

Service = TypeVar("Service")


@dataclass(frozen=True, kw_only=True)
class OnLoop:
    """What runs on a loop of another thread."""

    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on that loop and wait."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=PATIENCE_S)


@contextmanager
def in_loop_thread(
    service: AbstractAsyncContextManager[Service], name: str
) -> Iterator[tuple[Service, asyncio.AbstractEventLoop]]:
    """Enter the service in its thread, and leave it there; an error of its start is raised here."""
    started: list[tuple[Service, asyncio.AbstractEventLoop] | Llama4Error] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def main() -> None:
        try:
            async with service as running:
                started.append((running, asyncio.get_running_loop()))
                ready.set()
                await stop.wait()
        except Llama4Error as error:
            started.append(error)  # raised again in the caller's thread
            ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name=name, daemon=True)
    thread.start()
    if not ready.wait(PATIENCE_S):  # no assert: this runs under `python -O` too
        raise TimeoutError(f"the {name} did not start")
    answer = started[0]
    if isinstance(answer, Llama4Error):
        raise answer
    try:
        yield answer
    finally:
        answer[1].call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_S)
        if thread.is_alive():
            raise TimeoutError(f"the {name} did not stop")
