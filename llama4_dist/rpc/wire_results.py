"""Results of request.py ⇄ the public messages they are answered in."""

from collections.abc import Iterable

from llama4_dist.request import (
    CompletionOutput,
    EngineLimits,
    FinishReason,
    PositionLogprobs,
    TokenLogprob,
    Usage,
)
from llama4_dist.v1 import types_pb2

FINISH_REASONS = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: types_pb2.FINISH_REASON_CANCELLED,
}
FINISH_NAMES = {number: reason for reason, number in FINISH_REASONS.items()}


def logprobs_to_proto(positions: Iterable[PositionLogprobs | None]) -> list[types_pb2.PositionLogprobs]:
    """Write positions; None (nothing precedes the first token) is an empty message."""
    written = []
    for position in positions:
        message = types_pb2.PositionLogprobs()
        if position is not None:
            message.token.CopyFrom(token_to_proto(position.token))
            message.top.extend(token_to_proto(token) for token in position.top)
        written.append(message)
    return written


def token_to_proto(token: TokenLogprob) -> types_pb2.TokenLogprob:
    """Write one token's log-probability."""
    return types_pb2.TokenLogprob(token_id=token.token_id, logprob=token.logprob, rank=token.rank)


def logprobs_from_proto(messages: Iterable[types_pb2.PositionLogprobs]) -> tuple[PositionLogprobs | None, ...]:
    """Read positions back."""
    return tuple(
        PositionLogprobs(
            token=token_from_proto(message.token), top=tuple(token_from_proto(token) for token in message.top)
        )
        if message.HasField("token")
        else None
        for message in messages
    )


def token_from_proto(message: types_pb2.TokenLogprob) -> TokenLogprob:
    """Read one token's log-probability."""
    return TokenLogprob(token_id=message.token_id, logprob=message.logprob, rank=message.rank)


def usage_to_proto(usage: Usage) -> types_pb2.Usage:
    """Write token counts."""
    return types_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )


def usage_from_proto(message: types_pb2.Usage) -> Usage:
    """Read token counts."""
    return Usage(prompt_tokens=message.prompt_tokens, completion_tokens=message.completion_tokens)


def stop_to_proto(stop_reason: str | int | None) -> types_pb2.StopMatch | None:
    """Write what stopped a sequence."""
    if stop_reason is None:
        return None
    if isinstance(stop_reason, str):
        return types_pb2.StopMatch(stop=stop_reason)
    return types_pb2.StopMatch(token_id=stop_reason)


def stop_from_proto(message: types_pb2.Output | types_pb2.Finished) -> str | int | None:
    """Read what stopped a sequence."""
    match message.stop_match.WhichOneof("match"):
        case "stop":
            return message.stop_match.stop
        case "token_id":
            return message.stop_match.token_id
    return None


def output_to_proto(output: CompletionOutput, *, return_token_ids: bool) -> types_pb2.Output:
    """Write a finished sequence."""
    return types_pb2.Output(
        index=output.index,
        text=output.text,
        token_ids=output.token_ids if return_token_ids else (),
        logprobs=logprobs_to_proto(output.logprobs or ()),
        finish_reason=FINISH_REASONS[output.finish_reason],
        stop_match=stop_to_proto(output.stop_reason),
    )


def output_from_proto(message: types_pb2.Output, *, with_logprobs: bool) -> CompletionOutput:
    """Read a finished sequence; an unknown finish reason reads as STOP."""
    logprobs = tuple(position for position in logprobs_from_proto(message.logprobs) if position is not None)
    return CompletionOutput(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=logprobs if with_logprobs else None,
        finish_reason=FINISH_NAMES.get(message.finish_reason, FinishReason.STOP),
        stop_reason=stop_from_proto(message),
    )


def model_to_proto(limits: EngineLimits, *, has_tokenizer: bool) -> types_pb2.Model:
    """Describe the served model."""
    return types_pb2.Model(
        name=f"models/{limits.model}",
        vocab_size=limits.vocab_size,
        max_context_tokens=limits.max_context,
        max_num_sequences=limits.max_n,
        max_logprobs=limits.max_logprobs,
        has_tokenizer=has_tokenizer,
    )
