"""Answers of a gateway as plain data; pure."""

from dataclasses import dataclass

from llama4_dist.errors import EngineError
from llama4_dist.request import Completion, CompletionOutput, FinishReason, PositionLogprobs, Sampling, Usage
from llama4_dist.rpc import wire_results
from llama4_dist.v1 import inference_pb2, types_pb2

Answer = inference_pb2.GenerateResponse | inference_pb2.ChatResponse
Event = inference_pb2.StreamGenerateResponse | inference_pb2.StreamChatResponse


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model the gateway serves."""

    name: str
    vocab_size: int
    max_context: int
    max_n: int
    max_logprobs: int
    has_tokenizer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New tokens of one sequence, or its end."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


def model_card(message: types_pb2.Model) -> ModelCard:
    """Read a model."""
    return ModelCard(
        name=message.name,
        vocab_size=message.vocab_size,
        max_context=message.max_context_tokens,
        max_n=message.max_num_sequences,
        max_logprobs=message.max_logprobs,
        has_tokenizer=message.has_tokenizer,
    )


def completion(answer: Answer, sampling: Sampling | None) -> Completion:
    """Read a whole answer."""
    with_logprobs = sampling is not None and sampling.logprobs is not None
    with_prompt = sampling is not None and sampling.prompt_logprobs is not None
    return Completion(
        request_id=answer.request_id,
        prompt_token_ids=tuple(answer.prompt_token_ids),
        outputs=tuple(wire_results.output_from_proto(one, with_logprobs=with_logprobs) for one in answer.outputs),
        usage=wire_results.usage_from_proto(answer.usage),
        prompt_logprobs=wire_results.logprobs_from_proto(answer.prompt_logprobs) if with_prompt else None,
    )


class Assembler:
    """Collects the parts of a stream into the completion."""

    def __init__(self, sampling: Sampling | None) -> None:
        self._with_logprobs = sampling is not None and sampling.logprobs is not None
        self._with_prompt = sampling is not None and sampling.prompt_logprobs is not None
        self._started = types_pb2.Started()
        self._deltas: list[Delta] = []
        self._usage: Usage | None = None

    @property
    def request_id(self) -> str:
        """The server's id of the request; "" before its first event."""
        return self._started.request_id

    def begin(self, started: types_pb2.Started) -> None:
        """Take what stands before the first token."""
        self._started = started

    def add(self, delta: Delta) -> None:
        """Take new tokens or an end."""
        self._deltas.append(delta)

    def end(self, usage: types_pb2.Usage) -> None:
        """Take the counts of the last event."""
        self._usage = wire_results.usage_from_proto(usage)

    @property
    def completion(self) -> Completion:
        """The finished request; raise EngineError if the stream ended early."""
        if self._usage is None:
            raise EngineError("the stream ended before the request did", reason="STREAM_TRUNCATED")
        indices = sorted({delta.index for delta in self._deltas})
        prompt_logprobs = wire_results.logprobs_from_proto(self._started.prompt_logprobs)
        return Completion(
            request_id=self.request_id,
            prompt_token_ids=tuple(self._started.prompt_token_ids),
            outputs=tuple(self._output(index) for index in indices),
            usage=self._usage,
            prompt_logprobs=prompt_logprobs if self._with_prompt else None,
        )

    def _output(self, index: int) -> CompletionOutput:
        deltas = [delta for delta in self._deltas if delta.index == index]
        last = deltas[-1]
        if last.finish_reason is None:
            raise EngineError(f"sequence {index} never ended", reason="STREAM_TRUNCATED")
        logprobs = tuple(position for delta in deltas for position in delta.logprobs)
        return CompletionOutput(
            index=index,
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            logprobs=logprobs if self._with_logprobs else None,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
        )


def delta_of(event: Event) -> Delta | None:
    """Read the delta in an event, if it has one."""
    match event.WhichOneof("event"):
        case "delta":
            return delta_from_proto(event.delta)
        case "finished":
            return finish_from_proto(event.finished)
    return None


def delta_from_proto(message: types_pb2.TokenDelta) -> Delta:
    """Read new tokens."""
    positions = wire_results.logprobs_from_proto(message.logprobs)
    return Delta(
        index=message.output_index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(position for position in positions if position is not None),
    )


def finish_from_proto(message: types_pb2.Finished) -> Delta:
    """Read the end of a sequence."""
    return Delta(
        index=message.output_index,
        finish_reason=wire_results.FINISH_NAMES.get(message.finish_reason, FinishReason.STOP),
        stop_reason=wire_results.stop_from_proto(message),
    )
