"""What a running request has produced so far: an append-only record that calls read at their own pace.

A slow reader costs nothing but its cursor: the record is bounded by max_tokens, and what piled up since a reader last
looked becomes one message. Knows neither gRPC nor the engine; lives on the event loop.
"""

import asyncio
from collections.abc import Sequence

from llama4_dist.errors import Llama4Error
from llama4_dist.request import FinishReason, PositionLogprobs, Sampling, TokenOutput, Usage
from llama4_dist.text.stream import TextStream
from llama4_dist.text.tokenizer import Tokenizer


class SequenceRecord:
    """One of the request's sequences."""

    def __init__(self, stream: TextStream | None) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[PositionLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._stream = stream

    def take(self, output: TokenOutput) -> int:
        """Append an output; return how many of its tokens count. A stop string may end the sequence here."""
        num_tokens = len(output.token_ids)
        if self._stream is not None:
            delta = self._stream.push(output.token_ids)
            self.texts.append(delta.text)
            if delta.stop_match is not None:
                num_tokens = delta.num_tokens
                self.finish_reason, self.stop_reason = FinishReason.STOP, delta.stop_match
        self.token_ids.extend(output.token_ids[:num_tokens])
        self.logprobs.extend((output.logprobs or ())[:num_tokens])
        if self.finish_reason is None and output.finish_reason is not None:
            self._finish(output)
        return num_tokens

    def _finish(self, output: TokenOutput) -> None:
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_token_id
        if self._stream is None:
            return
        rest = self._stream.finish()
        self.texts.append(rest.text)
        if rest.stop_match is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, rest.stop_match


class RunningRequest:
    """A request in the engine, its sequences' records, and how many calls read it."""

    def __init__(
        self,
        request_id: str,
        *,
        body: bytes,
        prompt_token_ids: Sequence[int],
        engine_ids: Sequence[str],
        sampling: Sampling,
        tokenizer: Tokenizer | None,
        now_s: float,
    ) -> None:
        self.request_id = request_id
        self.body = body  # digest of the request's content, without its id
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
        self.engine_ids = tuple(engine_ids)
        self.sequences = tuple(SequenceRecord(text_stream(sampling, tokenizer)) for _ in engine_ids)
        self.wants_logprobs = sampling.logprobs is not None
        self.queue_s = 0.0
        self.started_s = now_s
        self.last_token_s: float | None = None
        self.error: Llama4Error | None = None
        self.num_readers = 0
        self.begun = False  # the engine has said something
        self._changed = asyncio.Event()

    @property
    def done(self) -> bool:
        return self.error is not None or all(sequence.finish_reason for sequence in self.sequences)

    @property
    def usage(self) -> Usage:
        num_generated = sum(len(sequence.token_ids) for sequence in self.sequences)
        return Usage(prompt_tokens=len(self.prompt_token_ids), completion_tokens=num_generated)

    def take(self, index: int, output: TokenOutput) -> int:
        """Record one output of sequence `index`; return how many tokens it added. Readers wake at `wake`."""
        self.begun = True
        if output.queue_s is not None:
            self.queue_s = max(self.queue_s, output.queue_s)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.error is not None:
            self.error = self.error or output.error
            return 0
        return self.sequences[index].take(output)

    def wake(self) -> None:
        """Wake every reader."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Wait for the next `wake`. Nothing can be missed: check, then call this without awaiting in between."""
        await self._changed.wait()


def text_stream(sampling: Sampling, tokenizer: Tokenizer | None) -> TextStream | None:
    """Build the detokeniser of one sequence; None where there is no tokenizer."""
    if tokenizer is None:
        return None
    return TextStream(
        tokenizer,
        stop=sampling.stop,
        include_stop=sampling.include_stop_str_in_output,
        skip_special_tokens=sampling.skip_special_tokens,
        min_tokens=sampling.min_tokens,
    )
