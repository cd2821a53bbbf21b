"""Prompts, texts, conversations and request ids are refused by name, and nothing is ever cut to fit."""

import dataclasses
from typing import Any

import pytest

from llama4_dist.errors import InvalidRequestError
from llama4_dist.request import EngineLimits, Message, Sampling
from llama4_dist.validation import check_messages, check_prompt, check_request_id, check_text, check_token_ids

LIMITS = EngineLimits(model="tiny", vocab_size=320, max_context=100, max_waiting=4)


@pytest.mark.parametrize("token_id", [-1, 320, 2**31 - 1, 1.0, None, True, "1"])
def test_a_prompt_id_outside_the_vocabulary_is_refused_by_place(token_id: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"prompt\[2\]"):
        check_prompt([1, 2, token_id, 3], Sampling(), LIMITS)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="prompt: is empty"):
        check_prompt([], Sampling(), LIMITS)
    with pytest.raises(InvalidRequestError, match="prompt: is empty"):
        check_text("prompt", "", LIMITS)


@pytest.mark.parametrize(("length", "max_tokens", "fits"), [
    (99, None, True), (100, None, False), (90, 10, True), (90, 11, False), (99, 1, True), (10_000_000, 1, False),
])  # fmt: skip
def test_a_prompt_that_does_not_fit_is_refused_and_never_cut(length: int, max_tokens: int | None, fits: bool) -> None:
    sampling = Sampling(max_tokens=max_tokens)
    if fits:
        check_prompt([7] * length, sampling, LIMITS)
        return
    with pytest.raises(InvalidRequestError, match=f"{length} tokens") as caught:
        check_prompt([7] * length, sampling, LIMITS)
    assert caught.value.reason == "CONTEXT_LENGTH_EXCEEDED"


def test_text_is_bounded_in_bytes_and_valid_unicode() -> None:
    limits = dataclasses.replace(LIMITS, max_prompt_bytes=10)
    check_text("prompt", "é" * 5, limits)
    check_text("prompt", "\x00\u202e\u200d", limits)
    for text, named in {"é" * 6: "12 bytes", "a" * 11: "10 bytes", "a\udfff": "surrogate at character 1"}.items():
        with pytest.raises(InvalidRequestError, match=named):
            check_text("prompt", text, limits)


def test_token_ids_of_any_field_are_checked() -> None:
    check_token_ids("token_ids", [], 320)
    with pytest.raises(InvalidRequestError, match=r"token_ids\[0\]"):
        check_token_ids("token_ids", [320], 320)


def user(content: Any = "hi") -> Message:
    return Message(role="user", content=content)


@pytest.mark.parametrize(
    ("messages", "fields"),
    [
        ([], ["messages"]),
        ([user()] * 5, ["messages"]),
        ([Message(role="assistant", content="hi")], ["messages[0].role"]),
        ([Message(role="ipython", content="hi")], ["messages[0].role"]),
        ([user(), Message(role="tool", content="x"), user(3)], ["messages[1].role", "messages[2].content"]),
        ([user(), Message(role=None, content="\ud800")], ["messages[1].role", "messages[1].content"]),  # type: ignore[arg-type]
        ([user("a" * 21)], ["messages[0].content"]),
        ([user("a" * 11), user("é" * 5)], ["messages"]),
    ],
)
def test_a_conversation_is_refused_by_message_and_field(messages: list[Message], fields: list[str]) -> None:
    limits = dataclasses.replace(LIMITS, max_messages=4, max_prompt_bytes=20)
    with pytest.raises(InvalidRequestError) as caught:
        check_messages(messages, limits)
    assert [violation.field for violation in caught.value.violations] == fields


def test_the_four_roles_make_a_conversation() -> None:
    roles = ("system", "user", "assistant", "ipython", "assistant", "user")
    check_messages([Message(role=role, content="") for role in roles], LIMITS)


@pytest.mark.parametrize("request_id", ["a", "A-b_c.d:e", "0" * 128])
def test_a_plain_request_id_is_allowed(request_id: str) -> None:
    check_request_id(request_id)


@pytest.mark.parametrize("request_id", ["", "0" * 129, "a b", "a\n", "a\x00", "é", "../x", "a/0", None, b"a"])
def test_any_other_request_id_is_refused(request_id: Any) -> None:
    with pytest.raises(InvalidRequestError, match="request_id"):
        check_request_id(request_id)
