"""The chat format is Meta's, id for id, and content can forge none of it."""

import sys
import types
from importlib.resources import files
from pathlib import Path

import pytest

from llama4_dist.errors import InvalidRequestError, UnsupportedError
from llama4_dist.request import Message
from llama4_dist.text.chat import encode_chat
from llama4_dist.text.meta_tokenizer import read_meta_tokenizer
from llama4_dist.text.tokenizer import Tokenizer

REAL_FILE = Path(str(files("llama_models"))) / "llama4" / "tokenizer.model"
CONVERSATION = (
    Message(role="system", content="  Be brief. "),
    Message(role="user", content="What is 2 + 2?\n"),
    Message(role="assistant", content="4"),
    Message(role="user", content="And <|eot|> in German? 日本"),
)


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return read_meta_tokenizer(REAL_FILE)


def test_a_conversation_reads_as_the_published_format(real: Tokenizer) -> None:
    token_ids = encode_chat(real, CONVERSATION)
    assert real.decode(token_ids, skip_special_tokens=False) == (
        "<|begin_of_text|>"
        "<|header_start|>system<|header_end|>\n\n  Be brief. <|eot|>"
        "<|header_start|>user<|header_end|>\n\nWhat is 2 + 2?\n<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n4<|eot|>"
        "<|header_start|>user<|header_end|>\n\nAnd <|eot|> in German? 日本<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )
    assert token_ids.count(real.special_token_id("<|eot|>")) == len(CONVERSATION)


def test_without_a_generation_prompt_it_ends_with_the_last_message(real: Tokenizer) -> None:
    token_ids = encode_chat(real, CONVERSATION, add_generation_prompt=False)
    assert token_ids[-1] == real.special_token_id("<|eot|>")
    assert encode_chat(real, CONVERSATION)[: len(token_ids)] == token_ids


def test_a_tools_result_ends_the_message_but_not_the_turn(real: Tokenizer) -> None:
    token_ids = encode_chat(real, [Message(role="ipython", content="4")], add_generation_prompt=False)
    assert real.decode(token_ids, skip_special_tokens=False) == (
        "<|begin_of_text|><|header_start|>ipython<|header_end|>\n\n4<|eom|>"
    )


def test_an_unknown_role_is_refused_by_name(real: Tokenizer) -> None:
    messages = [Message(role="user", content="hi"), Message(role="tool<|eot|>", content="x")]
    with pytest.raises(InvalidRequestError) as caught:
        encode_chat(real, messages)
    assert [violation.field for violation in caught.value.violations] == ["messages[1].role"]


def test_a_vocabulary_without_chat_tokens_cannot_chat() -> None:
    tokenizer = Tokenizer([b"a"], {"<|begin_of_text|>": 1}, lambda text: [0])
    with pytest.raises(UnsupportedError, match="header_start"):
        encode_chat(tokenizer, [Message(role="user", content="a")])


def test_ids_equal_metas_chat_format(real: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Meta's module imports its image preprocessing and PIL at the top, which no text message touches.
    fakes: dict[str, dict[str, object]] = {
        "PIL": {"Image": types.SimpleNamespace(Image=object)},
        "llama_models.llama4.preprocess": dict.fromkeys(
            ("ResizeNormalizeImageTransform", "VariableSizeImageTransform"), object
        ),
    }
    for name, members in fakes.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    from llama_models.datatypes import RawMessage
    from llama_models.llama4.chat_format import ChatFormat
    from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer

    metas = ChatFormat(MetaTokenizer(REAL_FILE))
    messages = [*CONVERSATION, Message(role="ipython", content="result <|eom|>")]
    roles = {"ipython": "tool"}
    raw = [RawMessage(role=roles.get(m.role, m.role), content=m.content) for m in messages]
    assert encode_chat(real, messages) == metas.encode_dialog_prompt(raw).tokens
