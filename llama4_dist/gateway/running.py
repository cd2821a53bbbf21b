"""What a running request has produced so far: an append-only record that calls read at their own pace.

A slow reader costs nothing but its place: the record is bounded by max_tokens, and what piled up since a reader last
looked becomes one message. Knows neither gRPC nor the engine; lives on the event loop.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

from llama4_dist.errors import Llama4Error
from llama4_dist.request import TokenOutput
from llama4_dist.telemetry.tracing import UNTRACED, OpenSpan
from llama4_dist.text.output_sequence import Delta, Finished
from llama4_dist.text.request_state import Event, RequestState


class RunningRequest:
    """A request in the engine, its events, and how many calls read them.

    `request_id` is the client's name for it; the engine knows `state.request_id`. An `attached` one was submitted by
    another gateway: its record is made again from its first token on. `span` is its place in the caller's trace.
    """

    def __init__(
        self,
        request_id: str,
        state: RequestState,
        *,
        body: bytes,
        now_s: float,
        attached: bool = False,
        span: OpenSpan = UNTRACED,
    ) -> None:
        self.request_id = request_id
        self.state = state
        self.body = body  # digest of the request's content, without its id
        self.events: list[Event] = []
        self.error: Llama4Error | None = None
        self.attached = attached
        self.span = span
        self.num_readers = 0
        self.started_s = now_s
        self.last_token_s: float | None = None
        self._heard = False
        # Tokens that each sequence has to catch up with; None until the engine has said how many.
        self._behind: dict[str, int | None] = dict.fromkeys(state.running if attached else ())
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def begun(self) -> bool:
        """Whether the engine has said all that stands before the first token."""
        waits_for_prompt = self.state.sampling.prompt_logprobs is not None and self.state.prompt_logprobs is None
        return self._heard and not waits_for_prompt

    @property
    def caught_up(self) -> bool:
        """Whether all tokens are here that there were when the request was attached."""
        return not self._behind

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
        """Record one output and return what it adds, at most one token an event. Readers wake at `wake`."""
        events: tuple[Event, ...] = ()
        try:
            if len(output.token_ids) <= 1:
                events = self.state.push(output)
            else:
                events = tuple(event for one in singly(output) for event in self.state.push(one))
        except Llama4Error as error:
            self.error = self.error or error
            return ()
        if self._behind:
            self._catch_up(output)
        self._heard = True  # a failure comes before this: a stream that never began answers without headers
        self.events += events
        return events

    def _catch_up(self, output: TokenOutput) -> None:
        if output.attached_tokens is not None:
            self._behind[output.request_id] = output.attached_tokens
        running, num_tokens = self.state.running, self.state.num_tokens
        behind = zip(self._behind.values(), num_tokens, self._behind, strict=True)
        if all(key not in running or (wanted is not None and count >= wanted) for wanted, count, key in behind):
            self._behind.clear()

    def wake(self) -> None:
        """Wake every reader."""
        waiting, self._waiting = self._waiting, []
        for reader in waiting:
            if not reader.done():  # a cancelled reader is
                reader.set_result(None)

    async def changed(self) -> None:
        """Wait for the next `wake`. Nothing can be missed: check, then call this without awaiting in between."""
        reader = asyncio.get_running_loop().create_future()
        self._waiting.append(reader)
        await reader


def singly(output: TokenOutput) -> Iterator[TokenOutput]:
    """Cut an output of several tokens into single ones, so that a reader can begin after any of them."""
    last = len(output.token_ids) - 1
    for place, token_id in enumerate(output.token_ids):
        yield replace(
            output,
            token_ids=(token_id,),
            logprobs=None if output.logprobs is None else output.logprobs[place : place + 1],
            prompt_logprobs=output.prompt_logprobs if place == 0 else None,
            finish_reason=output.finish_reason if place == last else None,
            stop_token_id=output.stop_token_id if place == last else None,
        )


def coalesced(events: list[Event]) -> list[Event]:
    """Join the deltas of each sequence into one; the order within a sequence stays."""
    if len(events) <= 1:
        return events
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
