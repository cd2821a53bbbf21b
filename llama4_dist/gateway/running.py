"""What a running request has produced so far: an append-only record that calls read at their own pace.

A slow reader costs nothing but its place: the record is bounded by max_tokens, and what piled up since a reader last
looked becomes one message. Knows neither gRPC nor the engine; lives on the event loop.
"""

import asyncio

from llama4_dist.errors import Llama4Error
from llama4_dist.request import TokenOutput
from llama4_dist.text.output_sequence import Delta, Finished
from llama4_dist.text.request_state import Event, RequestState


class RunningRequest:
    """A request in the engine, its events, and how many calls read them.

    `request_id` is the client's name for it; the engine knows `state.request_id`, which was drawn here.
    """

    def __init__(self, request_id: str, state: RequestState, *, body: bytes, now_s: float) -> None:
        self.request_id = request_id
        self.state = state
        self.body = body  # digest of the request's content, without its id
        self.events: list[Event] = []
        self.error: Llama4Error | None = None
        self.num_readers = 0
        self.started_s = now_s
        self.last_token_s: float | None = None
        self._heard = False
        self._changed = asyncio.Event()

    @property
    def begun(self) -> bool:
        """Whether the engine has said all that stands before the first token."""
        waits_for_prompt = self.state.sampling.prompt_logprobs is not None and self.state.prompt_logprobs is None
        return self._heard and not waits_for_prompt

    @property
    def done(self) -> bool:
        return self.error is not None or self.state.done

    @property
    def outcome(self) -> str:
        """How it ended, in a word for the log."""
        if self.error is not None:
            return self.error.reason
        return "FINISHED" if self.state.done else "ABANDONED"

    def take(self, output: TokenOutput) -> tuple[Event, ...]:
        """Record one output and return what it adds. Readers wake at `wake`."""
        try:
            events = self.state.push(output)
        except Llama4Error as error:
            self.error = self.error or error
            return ()
        self._heard = True  # a failure comes before this: a stream that never began answers without headers
        self.events.extend(events)
        return events

    def wake(self) -> None:
        """Wake every reader."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Wait for the next `wake`. Nothing can be missed: check, then call this without awaiting in between."""
        await self._changed.wait()


def coalesced(events: list[Event]) -> list[Event]:
    """Join the deltas of each sequence into one; the order within a sequence stays."""
    deltas: dict[int, list[Delta]] = {}
    ends: list[Finished] = []
    for event in events:
        if isinstance(event, Delta):
            deltas.setdefault(event.index, []).append(event)
        else:
            ends.append(event)
    return [*(joined(index, parts) for index, parts in deltas.items()), *ends]


def joined(index: int, parts: list[Delta]) -> Delta:
    """Join deltas of one sequence."""
    if len(parts) == 1:
        return parts[0]
    with_logprobs = any(part.logprobs is not None for part in parts)
    return Delta(
        index=index,
        text="".join(part.text for part in parts),
        token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
        logprobs=tuple(position for part in parts for position in part.logprobs or ()) if with_logprobs else None,
    )
