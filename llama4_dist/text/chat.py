"""Writes a conversation as Llama 4 was trained to read it; built in code, so no template of a checkpoint ever runs.

Format: Meta's ChatFormat (llama-models, models/llama4/chat_format.py). Per message
`<|header_start|>ROLE<|header_end|>\\n\\n` content `<|eot|>`; a tool's result (ipython) ends with `<|eom|>`, because the
assistant's turn goes on. No system prompt is added and no content is trimmed.
"""

from collections.abc import Sequence

from llama4_dist.errors import FieldViolation, InvalidRequestError
from llama4_dist.request import Message
from llama4_dist.text.tokenizer import Tokenizer
from llama4_dist.validation import ROLES


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
    """Return the ids of a conversation, BOS first; with a generation prompt the assistant's header comes last.

    A message's content is plain text: a control token written in it stays text. Raises InvalidRequestError naming
    messages[i].role for a role the model does not know.
    """
    token_ids = [tokenizer.bos_token_id]
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            description = f"must be one of {', '.join(ROLES)}, not {message.role!r}"
            raise InvalidRequestError([FieldViolation(field=f"messages[{index}].role", description=description)])
        token_ids += _header(tokenizer, message.role)
        token_ids += tokenizer.encode(message.content)
        token_ids.append(tokenizer.special_token_id("<|eom|>" if message.role == "ipython" else "<|eot|>"))
    if add_generation_prompt:
        token_ids += _header(tokenizer, "assistant")
    return token_ids


def _header(tokenizer: Tokenizer, role: str) -> list[int]:
    start = tokenizer.special_token_id("<|header_start|>")
    end = tokenizer.special_token_id("<|header_end|>")
    # Encoded apart from the content, so that "\n\n" never merges with what follows it.
    return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]
