"""Gathers one sequence's tokens, log-probabilities and text; decides by stop strings where it ends."""

from dataclasses import dataclass

from llama4_dist.request import CompletionOutput, FinishReason, PositionLogprobs, Sampling, TokenOutput
from llama4_dist.text.stream import TextStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New tokens of one sequence and the text that may be shown now, which may lag behind the tokens.

    `logprobs` is parallel to `token_ids` where asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event of one sequence. `stop_reason` is the stop string or the end token's id.

    `abort` is the engine's request id if the engine does not know yet that the sequence ended; abort it there.
    """

    index: int
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    abort: str | None = None


class OutputSequence:
    """What has come of one of a request's `n` sequences: append-only lists, and how it ended.

    `stream` None means there is no tokenizer and so no text.
    """

    def __init__(self, index: int, sampling: Sampling, stream: TextStream | None) -> None:
        self.index = index
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[PositionLogprobs] | None = None if sampling.logprobs is None else []
        self.ended = False
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._stream = stream
        self._show_stop_token = sampling.include_stop_str_in_output

    def push(self, output: TokenOutput) -> tuple[Delta | Finished, ...]:
        """Take one step's tokens; raise the output's error if it holds one."""
        if output.error is not None:
            self.ended = True
            raise output.error
        text, stop_string, num_kept = self._read(output)
        delta = self._keep(output, text, num_kept)
        events: tuple[Delta | Finished, ...] = (delta,) if delta.token_ids or delta.text else ()
        if stop_string is None and output.finish_reason is None:
            return events
        self.ended = True
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_token_id
        if stop_string is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, stop_string
        assert self.finish_reason is not None, "a sequence ended without a reason"
        finished = Finished(
            index=self.index,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            abort=output.request_id if output.finish_reason is None else None,
        )
        return (*events, finished)

    def output(self) -> CompletionOutput:
        """Return everything so far; a sequence that has not ended counts as cancelled."""
        return CompletionOutput(
            index=self.index,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            finish_reason=self.finish_reason or FinishReason.CANCELLED,
            stop_reason=self.stop_reason,
        )

    def _read(self, output: TokenOutput) -> tuple[str, str | None, int]:
        """Return the text to show, the stop string it met, and how many of the output's tokens count."""
        token_ids = output.token_ids
        if self._stream is None:
            return "", None, len(token_ids)
        # The end token counts as a token and belongs to the answer's ids, but is no part of its text.
        hidden = 1 if output.stop_token_id is not None and not self._show_stop_token else 0
        delta = self._stream.push(token_ids[: len(token_ids) - hidden])
        if delta.stop_match is not None:
            return delta.text, delta.stop_match, delta.num_tokens
        if output.finish_reason is None:
            return delta.text, None, len(token_ids)
        rest = self._stream.finish()
        return delta.text + rest.text, rest.stop_match, len(token_ids)

    def _keep(self, output: TokenOutput, text: str, num_kept: int) -> Delta:
        token_ids = output.token_ids[:num_kept]
        self.token_ids += token_ids
        if text:
            self.texts.append(text)
        logprobs = None
        if self.logprobs is not None and output.logprobs is not None:
            logprobs = output.logprobs[:num_kept]
            self.logprobs += logprobs
        return Delta(index=self.index, text=text, token_ids=token_ids, logprobs=logprobs)
