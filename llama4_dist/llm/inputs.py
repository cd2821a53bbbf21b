"""Brings what a caller may write (one prompt or many, messages as objects or dicts) into one shape."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from llama4_dist.errors import FieldViolation, InvalidRequestError
from llama4_dist.request import Message, Prompt, Sampling

Messages = Sequence[Message | Mapping[str, Any]]


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return a list of prompts: a string and a sequence of ids are each one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise invalid("prompts", f"must be text, token ids, or a list of them, not a {type(prompts).__name__}")
    if prompts and all(isinstance(token_id, int) for token_id in prompts):
        return [cast(Sequence[int], prompts)]
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str | Sequence):
            raise invalid(f"prompts[{index}]", f"must be text or token ids, not a {type(prompt).__name__}")
    return cast(list[Prompt], list(prompts))


def conversation_list(messages: Messages | Sequence[Messages]) -> list[list[Message]]:
    """Return a list of conversations: a list of messages is one conversation."""
    several = bool(messages) and isinstance(messages[0], Sequence)
    conversations = cast(Sequence[Messages], messages if several else [messages])
    return [[_message(index, entry) for index, entry in enumerate(entries)] for entries in conversations]


def sampling_list(sampling: Sampling | Sequence[Sampling] | None, default: Sampling, count: int) -> list[Sampling]:
    """Return one Sampling per prompt."""
    if sampling is None:
        sampling = default
    if isinstance(sampling, Sampling):
        return [sampling] * count
    if len(sampling) != count:
        raise invalid("sampling", f"has {len(sampling)} entries for {count} prompts; give one, or one for each")
    return list(sampling)


def invalid(field: str, description: str) -> InvalidRequestError:
    """Return the error for one wrong argument."""
    return InvalidRequestError([FieldViolation(field=field, description=description)])


def _message(index: int, entry: object) -> Message:
    if isinstance(entry, Message):
        return entry
    if not isinstance(entry, Mapping) or set(entry) != {"role", "content"}:
        raise invalid(f"messages[{index}]", "must be a Message, or a dict of exactly role and content")
    return Message(role=entry["role"], content=entry["content"])
