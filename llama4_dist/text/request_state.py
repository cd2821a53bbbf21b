"""One request between a face and an engine: fans out into sequences, gathers tokens into text; no thread, no transport.

Every face (Python, gateway) drives it alike:

    state = RequestState(request_id=..., prompt_token_ids=..., sampling=..., limits=engine.limits, tokenizer=...)
    for request in state.engine_requests(): engine.submit(request)
    for event in state.push(output): ...        # for each TokenOutput of state.running
        if isinstance(event, Finished) and event.abort: engine.abort(event.abort)
    state.completion()                          # once state.done
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace

from llama4_dist.errors import FieldViolation, InvalidRequestError
from llama4_dist.request import (
    Completion,
    EngineLimits,
    EngineRequest,
    PositionLogprobs,
    Sampling,
    TokenOutput,
    Usage,
)
from llama4_dist.text.output_sequence import Delta, Finished, OutputSequence
from llama4_dist.text.stream import TextStream
from llama4_dist.text.tokenizer import Tokenizer
from llama4_dist.validation import check_prompt, check_request_id, check_sampling, is_greedy

Event = Delta | Finished


class RequestState:
    """Validates a request, splits it into its `n` sequences and collects their answers.

    After each push it holds all tokens emitted so far, so `engine_requests` also replays the request on another engine.
    """

    def __init__(
        self,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: Sampling,
        limits: EngineLimits,
        tokenizer: Tokenizer | None,
        timeout_s: float | None = None,
        priority: int = 0,
    ) -> None:
        check_request_id(request_id)
        check_sampling(sampling, limits)
        check_prompt(prompt_token_ids, sampling, limits)
        self.request_id = request_id
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.sampling = _resolved(sampling, len(self.prompt_token_ids), limits)
        self.prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
        self.queue_s: float | None = None  # of the sequence that was admitted first
        self._timeout_s = timeout_s
        self._priority = priority
        self._sequences = {
            f"{request_id}/{index}": OutputSequence(index, self.sampling, _stream(tokenizer, sampling))
            for index in range(sampling.n)
        }

    @property
    def running(self) -> tuple[str, ...]:
        """Engine request ids that have not ended: what to abort if the caller goes away."""
        return tuple(key for key, sequence in self._sequences.items() if not sequence.ended)

    @property
    def done(self) -> bool:
        return all(sequence.ended for sequence in self._sequences.values())

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Tokens so far, by sequence."""
        return tuple(len(sequence.token_ids) for sequence in self._sequences.values())

    @property
    def usage(self) -> Usage:
        return Usage(prompt_tokens=len(self.prompt_token_ids), completion_tokens=sum(self.num_tokens))

    def engine_requests(self) -> tuple[EngineRequest, ...]:
        """Return one request per sequence that still runs, continuing after the tokens it has already emitted."""
        return tuple(self._engine_request(key) for key in self.running)

    def push(self, output: TokenOutput) -> tuple[Event, ...]:
        """Take what an engine produced for one sequence; raise its error if it failed.

        What an engine still says of a sequence that ended here (by a stop string) is ignored.
        """
        sequence = self._sequences[output.request_id]
        if sequence.ended:
            return ()
        if output.queue_s is not None and self.queue_s is None:
            self.queue_s = output.queue_s
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        return sequence.push(output)

    def completion(self) -> Completion:
        """Return the whole answer. A sequence that has not ended counts as cancelled."""
        return Completion(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            outputs=tuple(sequence.output() for sequence in self._sequences.values()),
            usage=self.usage,
            prompt_logprobs=self.prompt_logprobs,
        )

    def _engine_request(self, key: str) -> EngineRequest:
        sequence = self._sequences[key]
        # All sequences share the prompt, so the first one alone is asked about it, and only once.
        asks_about_prompt = sequence.index == 0 and self.prompt_logprobs is None
        return EngineRequest(
            request_id=key,
            prompt_token_ids=self.prompt_token_ids,
            sampling=replace(
                self.sampling,
                n=1,
                stop=(),  # strings are found here; the engine knows ids only
                prompt_logprobs=self.sampling.prompt_logprobs if asks_about_prompt else None,
            ),
            sequence_index=sequence.index,
            output_token_ids=tuple(sequence.token_ids),
            timeout_s=self._timeout_s,
            priority=self._priority,
        )


def _resolved(sampling: Sampling, num_prompt_tokens: int, limits: EngineLimits) -> Sampling:
    """Fix what the caller left open, so that a replay on another engine draws the same tokens."""
    return replace(
        sampling,
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
        max_tokens=sampling.max_tokens or limits.max_context - num_prompt_tokens,
        temperature=0.0 if is_greedy(sampling) else sampling.temperature,
    )


def _stream(tokenizer: Tokenizer | None, sampling: Sampling) -> TextStream | None:
    if tokenizer is None:
        if sampling.stop:
            problem = "needs a tokenizer, and this checkpoint has none; give stop_token_ids"
            raise InvalidRequestError([FieldViolation(field="stop", description=problem)])
        return None
    return TextStream(
        tokenizer,
        stop=sampling.stop,
        include_stop=sampling.include_stop_str_in_output,
        skip_special_tokens=sampling.skip_special_tokens,
        min_tokens=sampling.min_tokens,
    )
