"""The last readings of all hosts' counters, so that a window can reach back; computes no rate."""

import asyncio
import time
from collections import deque

from cluster.admin.calls import AdminCalls
from cluster.admin.load_rates import LoadReading
from cluster.control import ControlPlane

MAX_READINGS = 64
MAX_STRETCH = 2.0  # a window reaches back at most so many times as far as asked


class LoadHistory:
    """Shares readings among callers: for a window's end, one that is a quarter of the window old is new enough."""

    def __init__(self, control: ControlPlane, calls: AdminCalls) -> None:
        self._control = control
        self._calls = calls
        self._readings: deque[LoadReading] = deque(maxlen=MAX_READINGS)
        self._reading = asyncio.Lock()

    async def recent(self, window_s: float) -> LoadReading:
        """Return a reading that is new enough for the window."""
        return await self.since(time.monotonic() - window_s / 4)

    async def since(self, earliest_s: float) -> LoadReading:
        """Return the latest reading if it was taken at `earliest_s` or later, else wait until then and read."""
        await self._calls.pause(max(0.0, earliest_s - time.monotonic()))
        async with self._reading:
            if not self._readings or self._readings[-1].taken_s < earliest_s:
                loads = await self._calls.ask(self._control.loads)
                reading = LoadReading(taken_s=time.monotonic(), loads={load.host: load for load in loads})
                self._readings.append(reading)
            return self._readings[-1]

    async def window(self, window_s: float) -> tuple[LoadReading, LoadReading]:
        """Return two readings at least `window_s` apart; wait for the second where the first is not old enough."""
        now = await self.recent(window_s)
        for before in reversed(self._readings):
            if window_s <= now.taken_s - before.taken_s <= MAX_STRETCH * window_s:
                return before, now
        return now, await self.since(now.taken_s + window_s)
