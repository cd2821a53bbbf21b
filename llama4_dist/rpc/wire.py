"""Public requests ⇄ the dataclasses of request.py; checks that a message can be said in them, not what it asks for."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from llama4_dist.errors import FieldViolation, InvalidRequestError, UnsupportedError
from llama4_dist.request import Message, Prompt, Sampling
from llama4_dist.v1 import inference_pb2, types_pb2

# Sampling's field → (the message it stands in, its name there).
FIELDS = {
    "temperature": ("sampling", "temperature"),
    "top_p": ("sampling", "top_p"),
    "top_k": ("sampling", "top_k"),
    "min_p": ("sampling", "min_p"),
    "presence_penalty": ("sampling", "presence_penalty"),
    "frequency_penalty": ("sampling", "frequency_penalty"),
    "repetition_penalty": ("sampling", "repetition_penalty"),
    "seed": ("sampling", "seed"),
    "n": ("sampling", "num_sequences"),
    "max_tokens": ("stopping", "max_tokens"),
    "min_tokens": ("stopping", "min_tokens"),
    "ignore_eos": ("stopping", "ignore_eos"),
    "include_stop_str_in_output": ("stopping", "include_stop_in_output"),
    "logprobs": ("response", "logprobs"),
    "prompt_logprobs": ("response", "prompt_logprobs"),
    "skip_special_tokens": ("response", "skip_special_tokens"),
}
LISTS = {
    "stop": ("stopping", "stop"),
    "stop_token_ids": ("stopping", "stop_token_ids"),
    "bad_token_ids": ("sampling", "bad_token_ids"),
}
ROLES = {
    "system": types_pb2.ROLE_SYSTEM,
    "user": types_pb2.ROLE_USER,
    "assistant": types_pb2.ROLE_ASSISTANT,
    "ipython": types_pb2.ROLE_TOOL,
}
ROLE_NAMES = {number: name for name, number in ROLES.items()}
MAX_PRIORITY = 100

GenerationMessage = inference_pb2.GenerateRequest | inference_pb2.ChatRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationCall:
    """A generation as a client asked for it; `prompt` is text, token ids or chat messages."""

    model: str
    request_id: str
    prompt: str | tuple[int, ...] | tuple[Message, ...]
    sampling: Sampling
    priority: int = 0
    return_token_ids: bool = False
    return_prompt_token_ids: bool = False

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str) and bool(self.prompt) and isinstance(self.prompt[0], Message)


def call_from_proto(message: GenerationMessage, defaults: Sampling) -> GenerationCall:
    """Read a request; what it leaves out comes from `defaults`. Raise InvalidRequestError or UnsupportedError."""
    if message.HasField("reserved"):
        refuse_reserved(message.reserved)
    if abs(message.priority) > MAX_PRIORITY:
        raise invalid("priority", f"{message.priority} is outside -{MAX_PRIORITY}..{MAX_PRIORITY}")
    return GenerationCall(
        model=message.model,
        request_id=message.request_id,
        prompt=prompt_from_proto(message),
        sampling=sampling_from_proto(message, defaults),
        priority=message.priority,
        return_token_ids=message.response.return_token_ids,
        return_prompt_token_ids=message.response.return_prompt_token_ids,
    )


def refuse_reserved(reserved: types_pb2.ReservedOptions) -> None:
    """Raise UnsupportedError if a feature that is not built is asked for; it is never ignored."""
    asked = [field.name for field, _ in reserved.ListFields()]
    if asked:
        reason = "MODALITY_UNSUPPORTED" if "media" in asked else None
        raise UnsupportedError(f"this server does not have: {', '.join(asked)}; leave it out", reason=reason)


def prompt_from_proto(message: GenerationMessage) -> str | tuple[int, ...] | tuple[Message, ...]:
    """Read the prompt's form; raise InvalidRequestError when there is none."""
    if isinstance(message, inference_pb2.ChatRequest):
        return messages_from_proto(message.messages)
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return tuple(message.token_ids.ids)
    raise invalid("prompt", "is missing: give text or token_ids")


def messages_from_proto(messages: Iterable[types_pb2.ChatMessage]) -> tuple[Message, ...]:
    """Read chat messages; raise InvalidRequestError for no messages and for a role that does not exist."""
    read = []
    for place, message in enumerate(messages):
        role = ROLE_NAMES.get(message.role)
        if role is None:
            raise invalid(f"messages[{place}].role", f"{message.role} is no role: use system, user, assistant or tool")
        read.append(Message(role=role, content=message.content))
    if not read:
        raise invalid("messages", "is empty: give at least one message")
    return tuple(read)


def messages_to_proto(messages: Sequence[Message]) -> list[types_pb2.ChatMessage]:
    """Write chat messages."""
    for place, message in enumerate(messages):
        if message.role not in ROLES:
            raise invalid(f"messages[{place}].role", f"{message.role!r} is no role: use one of {', '.join(ROLES)}")
    return [types_pb2.ChatMessage(role=ROLES[message.role], content=message.content) for message in messages]


def sampling_from_proto(message: GenerationMessage, defaults: Sampling) -> Sampling:
    """Read sampling, stopping and response options over the defaults."""
    given: dict[str, Any] = {}
    for name, (part, field) in FIELDS.items():
        if getattr(message, part).HasField(field):
            given[name] = getattr(getattr(message, part), field)
    for name, (part, field) in LISTS.items():
        if values := getattr(getattr(message, part), field):
            given[name] = tuple(values)
    if message.sampling.logit_bias:
        given["logit_bias"] = dict(message.sampling.logit_bias)
    if message.sampling.HasField("allowed_token_ids"):
        given["allowed_token_ids"] = tuple(message.sampling.allowed_token_ids.ids)
    return replace(defaults, **given)


def generate_to_proto(
    prompt: Prompt, sampling: Sampling | None, *, model: str, request_id: str, priority: int
) -> inference_pb2.GenerateRequest:
    """Write a request that asks for tokens too; `sampling` None leaves everything to the server's defaults."""
    with sendable():
        message = inference_pb2.GenerateRequest(model=model, request_id=request_id, priority=priority)
        message.response.return_token_ids = message.response.return_prompt_token_ids = True
        if isinstance(prompt, str):
            message.text = prompt
        else:
            message.token_ids.CopyFrom(types_pb2.TokenIds(ids=prompt))
        sampling_to_proto(sampling, message)
    return message


def chat_to_proto(
    messages: Sequence[Message], sampling: Sampling | None, *, model: str, request_id: str, priority: int
) -> inference_pb2.ChatRequest:
    """Write a chat request that asks for tokens too."""
    with sendable():
        message = inference_pb2.ChatRequest(model=model, request_id=request_id, priority=priority)
        message.response.return_token_ids = message.response.return_prompt_token_ids = True
        message.messages.extend(messages_to_proto(messages))
        sampling_to_proto(sampling, message)
    return message


@contextmanager
def sendable() -> Iterator[None]:
    """Turn protobuf's own type and range errors into InvalidRequestError: such a value cannot even be sent."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise invalid("request", f"a value cannot be sent: {error}") from None


def sampling_to_proto(sampling: Sampling | None, message: GenerationMessage) -> None:
    """Write every field that has a value; None stays absent."""
    if sampling is None:
        return
    for name, (part, field) in FIELDS.items():
        if (value := getattr(sampling, name)) is not None:
            setattr(getattr(message, part), field, value)
    for name, (part, field) in LISTS.items():
        getattr(getattr(message, part), field).extend(getattr(sampling, name))
    for token_id, bias in sampling.logit_bias.items():
        message.sampling.logit_bias[token_id] = bias
    if sampling.allowed_token_ids is not None:
        message.sampling.allowed_token_ids.SetInParent()
        message.sampling.allowed_token_ids.ids.extend(sampling.allowed_token_ids)


def invalid(field: str, description: str) -> InvalidRequestError:
    """Build the error for one wrong field."""
    return InvalidRequestError([FieldViolation(field=field, description=description)])
