"""The latest reading of something that changes, shared by all who follow it; knows no gRPC."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Reading = TypeVar("Reading")


class Revised(Generic[Reading]):
    """Reads at most once in `max_age_s`, however many ask, and counts the changes it saw.

    `same` tells whether two readings are alike to a follower.
    """

    def __init__(
        self, read: Callable[[], Awaitable[Reading]], same: Callable[[Reading, Reading], bool], *, max_age_s: float
    ) -> None:
        self._read = read
        self._same = same
        self._max_age_s = max_age_s
        self._reading = asyncio.Lock()
        self._latest: Reading | None = None
        self._taken_s = 0.0
        self._revision = 0

    async def latest(self) -> tuple[int, Reading]:
        """Return the revision and its reading; what reading raises, each caller gets."""
        async with self._reading:
            if self._latest is None or time.monotonic() - self._taken_s >= self._max_age_s:
                reading = await self._read()
                if self._latest is None or not self._same(self._latest, reading):
                    self._revision += 1
                self._latest, self._taken_s = reading, time.monotonic()
            return self._revision, self._latest
