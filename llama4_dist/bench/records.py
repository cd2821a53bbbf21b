"""What a load generator sends and what it notes of each request; plain data, in seconds of one monotonic clock."""

from dataclasses import dataclass

from llama4_dist.errors import FieldViolation, InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request of an open loop: sent at `at_s` after the start, however many others still run."""

    at_s: float
    prompt_token_ids: tuple[int, ...]
    output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request as its client saw it. `tokens` holds (arrival, number of tokens) per message that brought tokens.

    All times count from the start of the run. `scheduled_s` is when the plan wanted it sent, `sent_s` when the client
    came to it. `error` is None for a complete answer, else the reason ("QUEUE_FULL").
    """

    scheduled_s: float
    sent_s: float
    ended_s: float
    prompt_tokens: int
    tokens: tuple[tuple[float, int], ...] = ()
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        return sum(number for _, number in self.tokens)

    @property
    def completed(self) -> bool:
        """Whether the whole answer came, with at least one token."""
        return self.error is None and bool(self.tokens)

    @property
    def ttft_s(self) -> float:
        """Time to first token, from the scheduled send time: a late client or a full server does not hide a wait."""
        return self.tokens[0][0] - self.scheduled_s

    @property
    def e2el_s(self) -> float:
        """End-to-end latency: the last token, from the scheduled send time."""
        return self.tokens[-1][0] - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        later = self.output_tokens - 1
        return (self.tokens[-1][0] - self.tokens[0][0]) / later if later > 0 else None

    @property
    def itls_s(self) -> tuple[float, ...]:
        """Inter-token latencies: gaps between messages that brought tokens, as vLLM counts chunks."""
        return tuple(after - before for (before, _), (after, _) in zip(self.tokens, self.tokens[1:], strict=False))


def wrong(field: str, description: str) -> InvalidRequestError:
    """Build the error of a benchmark that cannot be run as asked."""
    return InvalidRequestError([FieldViolation(field=field, description=description)])
