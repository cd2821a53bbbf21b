"""Delivers the outputs of steps in slices, so that the loop is never long away from its sockets; knows no transport."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from llama4_dist.gateway.running import RunningRequest
from llama4_dist.request import TokenOutput

SLICE = 4  # outputs delivered in one pass of the loop; gRPC takes in one new call every other pass
# A sixteenth of what waits, if that is more: steps that come faster than messages go must pile up in the records of
# their requests, where they are joined, and not here.
SHARE = 16

Take = Callable[[TokenOutput, float], RunningRequest | None]


class Delivery:
    """Outputs in the order they came. `take` adds one to its request, given the loop's time, and returns the request;
    `on_step` is told for each step the seconds from the engine's hand-over until its last reader was woken.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, take: Take, *, on_step: Callable[[float], None]) -> None:
        self._loop = loop
        self._take = take
        self._on_step = on_step
        self._outputs: deque[TokenOutput] = deque()
        self._num_arrived = 0
        self._steps: deque[tuple[int, float]] = deque()  # num_arrived after each, and when the engine handed it over

    def arrive(self, outputs: Sequence[TokenOutput], handed_over_s: float) -> None:
        """Take in one step's outputs; `handed_over_s` is on the clock of `time.perf_counter`."""
        idle = not self._outputs
        self._outputs += outputs
        self._num_arrived += len(outputs)
        self._steps.append((self._num_arrived, handed_over_s))
        if idle:
            self._deliver()

    def _deliver(self) -> None:
        """Deliver a slice and come again after one pass of the loop: what else came, refusals above all, goes between.

        A reader that was woken writes in that pass, so a slice also bounds how many messages are written in a row.
        """
        now_s = self._loop.time()
        touched: dict[RunningRequest, None] = {}
        for _ in range(min(max(SLICE, len(self._outputs) // SHARE), len(self._outputs))):
            running = self._take(self._outputs.popleft(), now_s)
            if running is not None:
                touched[running] = None
        for running in touched:
            running.wake()
        num_delivered = self._num_arrived - len(self._outputs)
        while self._steps and self._steps[0][0] <= num_delivered:
            _, handed_over_s = self._steps.popleft()
            self._on_step(time.perf_counter() - handed_over_s)
        if self._outputs:
            self._loop.call_soon(self._deliver)
