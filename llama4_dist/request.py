"""What a caller asks for and what it gets back; plain data, no torch, no transport, no clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from llama4_dist.errors import Llama4Error


class FinishReason(StrEnum):
    """Why a sequence ended. A failure is not a finish reason; it is an error."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw tokens and when to stop; the names are vLLM's `SamplingParams`.

    temperature 0 is greedy. top_k 0 or -1 is off. `seed` fixes every draw: the draw of a token depends on
    (seed, position, index of the sequence among `n`) alone, never on the batch it ran in. `max_tokens` None means as
    many as the context still holds. `logprobs` k returns the log-probability of each sampled token and of the k
    likeliest; they describe the model's distribution before temperature and truncation.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message. `role` is system, user, assistant or ipython (a tool's result)."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token's log-probability (natural logarithm) and its rank (1 = likeliest)."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLogprobs:
    """Log-probabilities at one position: of the token that stands there, and of the likeliest ones."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One sequence for the engine: token ids only, already validated, n == 1, seed resolved.

    `output_token_ids` are tokens already emitted by another engine (a replay): they count as output for penalties,
    limits and positions, and are not emitted again. `timeout_s` counts from submission. `sequence_index` is the
    sequence's place among the request's `n` and enters the seed. `tenant` says whose it is: tenants share no cached
    prefix. `digest` is of what the caller asked for: whoever
    knows id and digest may take the request over when its owner is gone; empty means nobody may. `trace` is the W3C
    `traceparent` of the span it belongs to, empty where it is not traced.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    sequence_index: int = 0
    output_token_ids: tuple[int, ...] = ()
    timeout_s: float | None = None
    priority: int = 0
    digest: bytes = b""
    tenant: str = ""
    trace: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """What one step produced for one sequence. After an output with `finish_reason` or `error`, none follows.

    `logprobs` is parallel to `token_ids` when asked for. `prompt_logprobs` comes once, on the first output: one entry
    per prompt position, None for the first. `stop_token_id` names the end token that stopped the sequence; that token
    is included in `token_ids`. `queue_s` (on the first output) is the time spent waiting for admission.
    `attached_tokens` (on the first output after `Engine.attach`) is how many tokens there were to catch up with.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] | None = None
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: Llama4Error | None = None
    queue_s: float | None = None
    attached_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What the engine can take; the validator of every face reads nothing else."""

    model: str
    vocab_size: int
    max_context: int
    max_waiting: int
    max_logprobs: int = 20
    max_n: int = 8
    max_stop_strings: int = 16
    max_stop_bytes: int = 256
    max_logit_bias: int = 1024
    max_prompt_bytes: int = 4 * 1024 * 1024
    max_messages: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one request over all its sequences."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One of the `n` sequences of a completion."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one prompt; the first sequence's fields are reachable directly."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    usage: Usage
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> tuple[PositionLogprobs, ...] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason


Prompt = str | Sequence[int]
