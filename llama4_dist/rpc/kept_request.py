"""What one request of an engine has said so far, so that a stream which takes it over hears all of it; plain data."""

import hmac
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from llama4_dist.engine.port import is_last
from llama4_dist.request import EngineRequest, PositionLogprobs, Sampling, TokenOutput
from llama4_dist.rpc.run_stream import RunStream

CHUNK_TOKENS = 4096  # of one message of a catch-up


@dataclass(eq=False, slots=True, kw_only=True)
class KeptRequest:
    """A request, its outputs, and the stream that hears them; `owner` None means that its stream broke.

    Positions count all output tokens of the request, also the `num_given` that another engine had emitted before; of
    these there are no log-probabilities here. `next_position` is the first that the owner has not been sent.
    """

    request_id: str
    digest: bytes
    sampling: Sampling
    num_given: int
    owner: RunStream | None
    next_position: int
    token_ids: "array[int]" = field(default_factory=lambda: array("I"))
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    first: TokenOutput | None = None
    last: TokenOutput | None = None
    aborted: bool = False
    expires_s: float = math.inf

    @classmethod
    def of(cls, request: EngineRequest, owner: RunStream) -> "KeptRequest":
        """Begin to keep a request: not its prompt, which may be long."""
        given = request.output_token_ids
        return cls(
            request_id=request.request_id,
            digest=request.digest,
            sampling=request.sampling,
            num_given=len(given),
            owner=owner,
            next_position=len(given),
            token_ids=array("I", given),
        )

    @property
    def ended(self) -> bool:
        return self.last is not None

    @property
    def may_be_attached(self) -> bool:
        return bool(self.digest)

    @property
    def weight(self) -> int:
        """Return how much memory it takes, in tokens; a log-probability counts as one."""
        return len(self.token_ids) + len(self.logprobs) * (1 + (self.sampling.logprobs or 0))

    def is_of(self, digest: bytes) -> bool:
        """Tell whether `digest` is this request's."""
        return self.may_be_attached and hmac.compare_digest(digest, self.digest)

    def can_begin_at(self, position: int) -> bool:
        """Tell whether all that was asked for is here from that output token on."""
        scored = self.sampling.logprobs is not None or self.sampling.prompt_logprobs is not None
        return position >= self.num_given or not scored

    def take(self, output: TokenOutput) -> TokenOutput | None:
        """Keep an output; return what of it is new to the owner."""
        begin = len(self.token_ids)
        if self.may_be_attached:
            self.token_ids.extend(output.token_ids)
            self.logprobs += output.logprobs or ()
            self.first = self.first or replace(output, token_ids=(), logprobs=None)
        if is_last(output):
            self.last = replace(output, token_ids=(), logprobs=None, prompt_logprobs=None, queue_s=None)
        if not self.may_be_attached:
            return output
        num_known = min(max(0, self.next_position - begin), len(output.token_ids))
        self.next_position = max(self.next_position, len(self.token_ids))
        if num_known == 0:
            return output
        if num_known == len(output.token_ids) and not self.ended:
            return None
        return replace(
            output,
            token_ids=output.token_ids[num_known:],
            logprobs=None if output.logprobs is None else output.logprobs[num_known:],
        )

    def catch_up(self, position: int, *, attached: bool) -> Sequence[TokenOutput]:
        """Return all outputs from that output token on, and count them as sent."""
        self.next_position = max(position, len(self.token_ids))
        outputs = list(self._chunks(position))
        if attached and not outputs:
            outputs = [TokenOutput(request_id=self.request_id)]
        if outputs and position == 0 and self.first is not None:
            outputs[0] = replace(outputs[0], queue_s=self.first.queue_s, prompt_logprobs=self.first.prompt_logprobs)
        if attached:
            outputs[0] = replace(outputs[0], attached_tokens=len(self.token_ids))
        if self.last is not None:
            last = outputs[-1] if outputs else TokenOutput(request_id=self.request_id)
            outputs[-1:] = [
                replace(
                    last,
                    finish_reason=self.last.finish_reason,
                    stop_token_id=self.last.stop_token_id,
                    error=self.last.error,
                )
            ]
        return outputs

    def _chunks(self, position: int) -> Iterator[TokenOutput]:
        scored = self.sampling.logprobs is not None
        for begin in range(position, len(self.token_ids), CHUNK_TOKENS):
            end = min(begin + CHUNK_TOKENS, len(self.token_ids))
            logprobs = tuple(self.logprobs[begin - self.num_given : end - self.num_given]) if scored else None
            yield TokenOutput(request_id=self.request_id, token_ids=tuple(self.token_ids[begin:end]), logprobs=logprobs)
