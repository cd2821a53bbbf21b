"""Checks what a caller wants answered: text, token ids, a conversation, and the id of the request itself."""

import re
from collections.abc import Iterator, Sequence

from llama4_dist.errors import FieldViolation
from llama4_dist.request import EngineLimits, Message, Sampling
from llama4_dist.validation.violations import outside_vocabulary, raise_any, shown, text_problem, violation

ROLES = ("system", "user", "assistant", "ipython")
FIRST_ROLES = ("system", "user")  # a conversation that opens with an answer answers nothing
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def check_prompt(token_ids: Sequence[int], sampling: Sampling, limits: EngineLimits) -> None:
    """Raise InvalidRequestError unless the prompt is in the vocabulary and fits the context with its answer.

    A prompt that does not fit is refused with reason CONTEXT_LENGTH_EXCEEDED; nothing is ever truncated.
    """
    if len(token_ids) == 0:
        raise_any([violation("prompt", "is empty; give at least one token")])
    num_new = sampling.max_tokens or 1
    if len(token_ids) + num_new > limits.max_context:
        description = (
            f"{len(token_ids)} tokens and room for {num_new} new ones (max_tokens) exceed the context of "
            f"{limits.max_context}; shorten the prompt or lower max_tokens"
        )
        raise_any([violation("prompt", description)], reason="CONTEXT_LENGTH_EXCEEDED")
    check_token_ids("prompt", token_ids, limits.vocab_size)


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequestError unless every id is a whole number inside the vocabulary."""
    raise_any(list(outside_vocabulary(field, token_ids, vocab_size)))


def check_text(field: str, text: str, limits: EngineLimits) -> None:
    """Raise InvalidRequestError unless `text` is a non-empty string of valid Unicode within the byte limit."""
    problem = text_problem(text, limits.max_prompt_bytes)
    if problem is None and not text:
        problem = "is empty; give at least one character"
    raise_any([violation(field, problem)] if problem else [])


def check_messages(messages: Sequence[Message], limits: EngineLimits) -> None:
    """Raise InvalidRequestError unless the conversation has known roles, valid text, a start and a bounded size."""
    if not messages:
        raise_any([violation("messages", "is empty; give at least one message")])
    if len(messages) > limits.max_messages:
        description = f"has {len(messages)} entries; at most {limits.max_messages} are allowed"
        raise_any([violation("messages", description)])
    raise_any([found for index, message in enumerate(messages) for found in _message(index, message, limits)])
    # Each part may be small enough and the sum not.
    num_bytes = sum(len(message.content.encode()) for message in messages)
    if num_bytes > limits.max_prompt_bytes:
        description = f"hold {num_bytes} bytes of text; at most {limits.max_prompt_bytes} are allowed"
        raise_any([violation("messages", description)])


def check_request_id(request_id: str) -> None:
    """Raise InvalidRequestError unless the id is 1 to 128 characters of A-Z, a-z, 0-9, '.', '_', ':' and '-'."""
    if not isinstance(request_id, str) or not _REQUEST_ID.fullmatch(request_id):
        description = f"must be 1 to 128 characters of A-Z a-z 0-9 . _ : -, not {shown(request_id)}"
        raise_any([violation("request_id", description)])


def _message(index: int, message: Message, limits: EngineLimits) -> Iterator[FieldViolation]:
    allowed = FIRST_ROLES if index == 0 else ROLES
    if message.role not in allowed:
        place = " in the first message" if index == 0 else ""
        description = f"must be one of {', '.join(allowed)}{place}, not {shown(message.role)}"
        yield violation(f"messages[{index}].role", description)
    problem = text_problem(message.content, limits.max_prompt_bytes)
    if problem:
        yield violation(f"messages[{index}].content", problem)
