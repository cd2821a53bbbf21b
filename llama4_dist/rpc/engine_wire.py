"""Requests and outputs ⇄ the messages of the internal engine service; knows no channel, no thread, no engine.

Both ends are of one release, so a field is copied as it is; range checks were the gateway's (`validation`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

from llama4_dist import errors
from llama4_dist.engine.port import EngineStats
from llama4_dist.errors import CheckpointError, EngineError, FieldViolation, InvalidRequestError, Llama4Error
from llama4_dist.internal.v1 import engine_pb2 as pb
from llama4_dist.request import (
    EngineLimits,
    EngineRequest,
    FinishReason,
    PositionLogprobs,
    Sampling,
    TokenLogprob,
    TokenOutput,
)

# Fields that are copied by name, both ways. Protobuf tells "absent" apart for those listed as optional.
SAMPLING_PLAIN = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "min_tokens", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens",
)  # fmt: skip
SAMPLING_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
SAMPLING_LISTS = ("stop", "stop_token_ids", "bad_token_ids")
LIMITS = (
    "model", "vocab_size", "max_context", "max_waiting", "max_logprobs", "max_n", "max_stop_strings",
    "max_stop_bytes", "max_logit_bias", "max_prompt_bytes", "max_messages",
)  # fmt: skip
STATS_NUMBERS = (
    "requests_running", "requests_waiting", "kv_blocks_total", "kv_blocks_free", "steps", "prompt_tokens",
    "generated_tokens", "preemptions", "requests_admitted", "requests_finished", "requests_cancelled",
    "requests_failed", "requests_replayed", "max_queue_age_s", "kv_blocks_cached", "prefix_hits", "prefix_tokens",
    "prefix_evictions", "step_holds", "step_held_s", "wait_on_experts_s", "resent_rows", "late_replies",
    "checked_frames", "steps_in_flight",
)  # fmt: skip
STATS_MAPS = (
    "station_seconds", "station_steps", "host_rows", "host_bytes_out", "host_bytes_in", "host_transports",
    "hedged_rows", "wrong_answers", "refused_frames", "lost_links", "reply_seconds", "replies",
)  # fmt: skip

FINISH_TO_WIRE = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}
FINISH_FROM_WIRE = {wire: reason for reason, wire in FINISH_TO_WIRE.items()}

# The closed set of errors that may cross; a name outside it is read as EngineError.
ERROR_KINDS: dict[str, type[Llama4Error]] = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Llama4Error)
}


def sampling_to_wire(sampling: Sampling) -> pb.Sampling:
    """Copy sampling parameters into their message."""
    message = pb.Sampling(logit_bias=dict(sampling.logit_bias))
    for name in SAMPLING_PLAIN:
        setattr(message, name, getattr(sampling, name))
    for name in SAMPLING_OPTIONAL:
        if (value := getattr(sampling, name)) is not None:
            setattr(message, name, value)
    for name in SAMPLING_LISTS:
        getattr(message, name).extend(getattr(sampling, name))
    if sampling.allowed_token_ids is not None:
        message.allowed_token_ids.CopyFrom(pb.TokenIds(token_ids=sampling.allowed_token_ids))
    return message


def sampling_from_wire(message: pb.Sampling) -> Sampling:
    """Copy the message back."""
    fields: dict[str, Any] = {name: getattr(message, name) for name in SAMPLING_PLAIN}
    fields |= {name: getattr(message, name) if message.HasField(name) else None for name in SAMPLING_OPTIONAL}
    fields |= {name: tuple(getattr(message, name)) for name in SAMPLING_LISTS}
    if message.HasField("allowed_token_ids"):
        fields["allowed_token_ids"] = tuple(message.allowed_token_ids.token_ids)
    return Sampling(**fields, logit_bias=dict(message.logit_bias))


def request_to_wire(request: EngineRequest) -> pb.SubmitCommand:
    """Copy an engine request into its command."""
    return pb.SubmitCommand(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=sampling_to_wire(request.sampling),
        sequence_index=request.sequence_index,
        output_token_ids=request.output_token_ids,
        timeout_s=request.timeout_s,
        priority=request.priority,
        digest=request.digest,
        tenant=request.tenant,
        trace=request.trace,
    )


def request_from_wire(message: pb.SubmitCommand) -> EngineRequest:
    """Copy the command back."""
    return EngineRequest(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling_from_wire(message.sampling),
        sequence_index=message.sequence_index,
        output_token_ids=tuple(message.output_token_ids),
        timeout_s=message.timeout_s if message.HasField("timeout_s") else None,
        priority=message.priority,
        digest=message.digest,
        tenant=message.tenant,
        trace=message.trace,
    )


def _token_to_wire(token: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=token.token_id, logprob=token.logprob, rank=token.rank)


def _token_from_wire(message: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=message.token_id, logprob=message.logprob, rank=message.rank)


def logprobs_to_wire(positions: Iterable[PositionLogprobs | None]) -> pb.LogprobsList:
    """Copy log-probabilities; a None (the first prompt position) becomes an empty entry."""
    wire = [
        pb.PositionLogprobs(token=_token_to_wire(at.token), top=[_token_to_wire(token) for token in at.top])
        if at is not None
        else pb.PositionLogprobs()
        for at in positions
    ]
    return pb.LogprobsList(positions=wire)


def logprobs_from_wire(message: pb.LogprobsList) -> tuple[PositionLogprobs | None, ...]:
    """Copy log-probabilities back."""
    return tuple(
        PositionLogprobs(token=_token_from_wire(at.token), top=tuple(_token_from_wire(token) for token in at.top))
        if at.HasField("token")
        else None
        for at in message.positions
    )


def output_to_wire(output: TokenOutput) -> pb.TokenOutput:
    """Copy one sequence's output of one step."""
    message = pb.TokenOutput(
        request_id=output.request_id,
        token_ids=output.token_ids,
        stop_token_id=output.stop_token_id,
        queue_s=output.queue_s,
        attached_tokens=output.attached_tokens,
    )
    if output.logprobs is not None:
        message.logprobs.CopyFrom(logprobs_to_wire(output.logprobs))
    if output.prompt_logprobs is not None:
        message.prompt_logprobs.CopyFrom(logprobs_to_wire(output.prompt_logprobs))
    if output.finish_reason is not None:
        message.finish_reason = FINISH_TO_WIRE[output.finish_reason]
    if output.error is not None:
        message.error.CopyFrom(error_to_wire(output.error))
    return message


def output_from_wire(message: pb.TokenOutput) -> TokenOutput:
    """Copy an output back."""
    logprobs = None
    if message.HasField("logprobs"):
        logprobs = tuple(at for at in logprobs_from_wire(message.logprobs) if at is not None)
    return TokenOutput(
        request_id=message.request_id,
        token_ids=tuple(message.token_ids),
        logprobs=logprobs,
        prompt_logprobs=logprobs_from_wire(message.prompt_logprobs) if message.HasField("prompt_logprobs") else None,
        finish_reason=FINISH_FROM_WIRE.get(message.finish_reason),
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        error=error_from_wire(message.error) if message.HasField("error") else None,
        queue_s=message.queue_s if message.HasField("queue_s") else None,
        attached_tokens=message.attached_tokens if message.HasField("attached_tokens") else None,
    )


def outputs_to_wire(outputs: Sequence[TokenOutput]) -> pb.RunResponse:
    """One step's outputs as one message."""
    return pb.RunResponse(outputs=[output_to_wire(output) for output in outputs])


def error_to_wire(error: Llama4Error) -> pb.Error:
    """Copy an error; its traceback stays here."""
    violations = error.violations if isinstance(error, InvalidRequestError) else ()
    return pb.Error(
        kind=type(error).__name__,
        message=error.message,
        reason=error.reason,
        metadata=dict(error.metadata),
        retry_after_s=error.retry_after_s,
        violations=[pb.FieldViolation(field=v.field, description=v.description) for v in violations],
    )


def error_from_wire(message: pb.Error) -> Llama4Error:
    """Rebuild an error of the same class, message and reason."""
    kind = ERROR_KINDS.get(message.kind, EngineError)
    if kind is InvalidRequestError:
        violations = [FieldViolation(field=v.field, description=v.description) for v in message.violations]
        return InvalidRequestError(violations, reason=message.reason)
    if kind is CheckpointError:  # carries its file and tensor as metadata
        metadata = dict(message.metadata)
        return CheckpointError(message.message, file=metadata.get("file", ""), tensor=metadata.get("tensor", ""))
    retry_after_s = message.retry_after_s if message.HasField("retry_after_s") else None
    return kind(message.message, reason=message.reason, metadata=dict(message.metadata), retry_after_s=retry_after_s)


def limits_to_wire(limits: EngineLimits) -> pb.GetLimitsResponse:
    """Copy the limits."""
    return pb.GetLimitsResponse(**{name: getattr(limits, name) for name in LIMITS})


def limits_from_wire(message: pb.GetLimitsResponse) -> EngineLimits:
    """Copy the limits back."""
    return EngineLimits(**{name: getattr(message, name) for name in LIMITS})


def stats_to_wire(stats: EngineStats) -> pb.GetStatsResponse:
    """Copy the counters."""
    fields: dict[str, Any] = {name: getattr(stats, name) for name in STATS_NUMBERS}
    return pb.GetStatsResponse(**fields | {name: dict(getattr(stats, name)) for name in STATS_MAPS})


def stats_from_wire(message: pb.GetStatsResponse) -> EngineStats:
    """Copy the counters back."""
    fields: dict[str, Any] = {name: getattr(message, name) for name in STATS_NUMBERS}
    return EngineStats(**fields | {name: dict(getattr(message, name)) for name in STATS_MAPS})
