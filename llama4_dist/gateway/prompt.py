"""Turns what a client asked into token ids, with every check in front; long texts are encoded off the event loop."""

import asyncio
import re

from llama4_dist.errors import FieldViolation, InvalidRequestError, NotFoundError, UnsupportedError
from llama4_dist.request import EngineLimits, Message
from llama4_dist.rpc.wire import GenerationCall
from llama4_dist.text.chat import encode_chat
from llama4_dist.text.tokenizer import Tokenizer
from llama4_dist.validation import check_messages, check_request_id, check_sampling, check_text

# Encoding this much takes under a millisecond; more would hold up every stream's next token.
INLINE_CHARS = 4096
MODEL_NAME = re.compile(r"(models/)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127})?")


def check_model(name: str, limits: EngineLimits) -> None:
    """Raise InvalidRequestError for what is no model name, NotFoundError for a model that is not served here."""
    if name in ("", limits.model, f"models/{limits.model}"):
        return
    if not MODEL_NAME.fullmatch(name):
        description = "is no model name: use models/{model} as ListModels gives it"
        raise InvalidRequestError([FieldViolation(field="model", description=description)])
    raise NotFoundError(
        f"model {name} is not served here; this server has models/{limits.model}",
        reason="MODEL_NOT_FOUND",
        metadata={"resource_type": "llama4_dist.v1.Model", "resource_name": name},
    )


async def tokenise(call: GenerationCall, tokenizer: Tokenizer | None, limits: EngineLimits) -> tuple[int, ...]:
    """Return the prompt's tokens; what `RequestState` does not check is checked here."""
    check_model(call.model, limits)
    if call.request_id:
        check_request_id(call.request_id)
    check_sampling(call.sampling, limits)  # before the work of encoding
    if isinstance(call.prompt, str):
        return await encode_text(call.prompt, tokenizer, limits, add_bos=True)
    if call.is_chat:
        messages = tuple(message for message in call.prompt if isinstance(message, Message))
        return await encode_messages(messages, tokenizer, limits, add_generation_prompt=True)
    return tuple(token for token in call.prompt if isinstance(token, int))


async def encode_text(
    text: str, tokenizer: Tokenizer | None, limits: EngineLimits, *, add_bos: bool
) -> tuple[int, ...]:
    """Encode plain text."""
    if tokenizer is None:
        raise without_tokenizer("text")
    check_text("text", text, limits)
    in_thread = len(text) > INLINE_CHARS
    encoded = await asyncio.to_thread(tokenizer.encode, text) if in_thread else tokenizer.encode(text)
    return (tokenizer.bos_token_id, *encoded) if add_bos else tuple(encoded)


async def encode_messages(
    messages: tuple[Message, ...], tokenizer: Tokenizer | None, limits: EngineLimits, *, add_generation_prompt: bool
) -> tuple[int, ...]:
    """Render a chat."""
    if tokenizer is None:
        raise without_tokenizer("chat")
    check_messages(messages, limits)

    def encode() -> list[int]:
        return encode_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt)

    in_thread = sum(len(message.content) for message in messages) > INLINE_CHARS or len(messages) > 64
    return tuple(await asyncio.to_thread(encode) if in_thread else encode())


def without_tokenizer(what: str) -> UnsupportedError:
    """Build the error for text where the checkpoint has no tokenizer files."""
    return UnsupportedError(f"this model has no tokenizer files, so {what} cannot be used: send token_ids")
