"""Sequences that were aborted and whose last words are still to come; until then their ids cannot be used again."""

import asyncio

from llama4_dist.engine.port import is_last
from llama4_dist.errors import DuplicateRequestError
from llama4_dist.request import TokenOutput

MAX_WAIT_S = 5.0


class Leaving:
    """Ids of sequences on their way out of the engine; lives on the event loop."""

    def __init__(self) -> None:
        self._sequences: dict[str, set[str]] = {}  # by the request they belong to
        self._changed = asyncio.Event()

    def add(self, sequence_id: str) -> None:
        """Note that a sequence was aborted."""
        self._sequences.setdefault(request_of(sequence_id), set()).add(sequence_id)

    def hear(self, output: TokenOutput) -> None:
        """Take what the engine says of a sequence that nobody reads any more."""
        if not is_last(output):
            return
        request = request_of(output.request_id)
        left = self._sequences.get(request, set())
        left.discard(output.request_id)
        if not left and self._sequences.pop(request, None) is not None:
            self._changed.set()
            self._changed = asyncio.Event()

    async def gone(self, engine_id: str, request_id: str) -> None:
        """Wait until nothing of a request is in the engine; DuplicateRequestError if that takes too long."""
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                while engine_id in self._sequences:
                    await self._changed.wait()
        except TimeoutError:
            raise DuplicateRequestError(f"request {request_id} has not ended yet: choose another id") from None


def request_of(sequence_id: str) -> str:
    """Return the request's part of a sequence's id."""
    return sequence_id.rpartition("/")[0]
