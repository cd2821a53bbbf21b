"""Requests and results say the same on both sides of the wire."""

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_dist.errors import InvalidRequestError, UnsupportedError
from llama4_dist.request import (
    CompletionOutput,
    EngineLimits,
    FinishReason,
    Message,
    PositionLogprobs,
    Sampling,
    TokenLogprob,
    Usage,
)
from llama4_dist.rpc import wire, wire_results
from llama4_dist.v1 import inference_pb2, types_pb2

DEFAULTS = Sampling(temperature=0.6, top_p=0.9)
INT32 = st.integers(-(2**31), 2**31 - 1)
DOUBLE = st.floats(allow_nan=False)


def samplings() -> st.SearchStrategy[Sampling]:
    """Every field at any value the wire can carry; whether it makes sense is the validator's business."""
    numbers: dict[str, st.SearchStrategy[Any]] = dict.fromkeys(
        ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"), DOUBLE
    )
    return st.builds(
        Sampling,
        **numbers,
        n=INT32,
        top_k=INT32,
        min_tokens=INT32,
        seed=st.integers(0, 2**64 - 1),
        max_tokens=INT32,
        stop=st.lists(st.text(), max_size=3).map(tuple),
        stop_token_ids=st.lists(INT32, max_size=3).map(tuple),
        bad_token_ids=st.lists(INT32, max_size=3).map(tuple),
        allowed_token_ids=st.none() | st.lists(INT32, max_size=3).map(tuple),
        logit_bias=st.dictionaries(INT32, DOUBLE, max_size=3),
        include_stop_str_in_output=st.booleans(),
        ignore_eos=st.booleans(),
        skip_special_tokens=st.booleans(),
        logprobs=INT32,
        prompt_logprobs=INT32,
    )


@given(samplings())
def test_sampling_arrives_as_it_was_sent(sampling: Sampling) -> None:
    sent = wire.generate_to_proto([1, 2], sampling, model="m", request_id="r", priority=3)
    data = sent.SerializeToString()
    call = wire.call_from_proto(inference_pb2.GenerateRequest.FromString(data), Sampling())
    assert call.sampling == sampling
    assert (call.prompt, call.model, call.request_id, call.priority) == ((1, 2), "m", "r", 3)


def test_every_sampling_field_has_a_place_on_the_wire() -> None:
    placed = {*wire.FIELDS, *wire.LISTS, "logit_bias", "allowed_token_ids"}
    assert placed == {field.name for field in fields(Sampling)}


def test_what_a_request_leaves_out_takes_the_models_defaults() -> None:
    message = inference_pb2.GenerateRequest(text="hi", stopping={"max_tokens": 4}, sampling={"top_p": 1.0})
    assert wire.call_from_proto(message, DEFAULTS).sampling == replace(DEFAULTS, max_tokens=4, top_p=1.0)


def test_an_explicit_zero_is_not_an_absent_field() -> None:
    message = inference_pb2.GenerateRequest(text="hi", sampling={"temperature": 0.0, "seed": 0})
    sampling = wire.call_from_proto(message, DEFAULTS).sampling
    assert (sampling.temperature, sampling.seed) == (0.0, 0)


def test_without_sampling_nothing_is_stated() -> None:
    message = wire.generate_to_proto("hi", None, model="", request_id="", priority=0)
    assert not message.HasField("sampling")
    assert wire.call_from_proto(message, DEFAULTS).sampling == DEFAULTS


def test_chat_messages_arrive_in_order() -> None:
    messages = [Message(role=role, content=role * 2) for role in ("system", "user", "assistant", "ipython", "user")]
    sent = wire.chat_to_proto(messages, None, model="", request_id="", priority=0)
    call = wire.call_from_proto(sent, DEFAULTS)
    assert call.prompt == tuple(messages)
    assert call.is_chat


@pytest.mark.parametrize(
    ("prompt", "sampling"),
    [
        ([2**31], None),
        ([-(2**31) - 1], None),
        (["a"], None),
        ([1.5], None),
        ("\ud800", None),
        ("a", Sampling(seed=-1)),
        ("a", Sampling(seed=2**64)),
        ("a", Sampling(max_tokens=2**31)),
        ("a", Sampling(stop=(5,))),  # type: ignore[arg-type]
        ("a", Sampling(temperature="hot")),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_sent_is_refused_before_it_is(prompt: Any, sampling: Sampling | None) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be sent"):
        wire.generate_to_proto(prompt, sampling, model="", request_id="", priority=0)


def test_every_reserved_field_is_refused_when_set() -> None:
    values: dict[str, Any] = {
        "media": [types_pb2.MediaItem()],
        "structured_output": types_pb2.StructuredOutput(),
        "cache_salt": "",
        "lora_adapter": "",
        "prompt_embeds": b"",
        "chat_template": "",
        "tools": ["x"],
    }
    assert set(values) == {field.name for field in types_pb2.ReservedOptions.DESCRIPTOR.fields}
    for name, value in values.items():
        for message in (inference_pb2.GenerateRequest(text="a"), inference_pb2.ChatRequest()):
            message.reserved.CopyFrom(types_pb2.ReservedOptions(**{name: value}))
            with pytest.raises(UnsupportedError, match=name):
                wire.call_from_proto(message, DEFAULTS)
    wire.call_from_proto(inference_pb2.GenerateRequest(text="a", reserved={}), DEFAULTS)


def test_an_unknown_role_names_its_place() -> None:
    with pytest.raises(InvalidRequestError, match=r"messages\[1\]\.role"):
        wire.messages_to_proto([Message(role="user", content=""), Message(role="robot", content="")])


def test_an_output_arrives_as_it_was_sent() -> None:
    token = TokenLogprob(token_id=5, logprob=-0.25, rank=2)
    logprobs = (PositionLogprobs(token=token, top=(TokenLogprob(token_id=6, logprob=-0.125, rank=1), token)),)
    for reason in FinishReason:
        for stop_reason in (None, "stop", "", 7, 0):
            sent = CompletionOutput(
                index=1,
                text="é",
                token_ids=(5,),
                logprobs=logprobs,
                finish_reason=reason,
                stop_reason=stop_reason,
            )
            message = wire_results.output_to_proto(sent, return_token_ids=True)
            read = types_pb2.Output.FromString(message.SerializeToString())
            assert wire_results.output_from_proto(read, with_logprobs=True) == sent
    assert wire_results.output_to_proto(sent, return_token_ids=False).token_ids == []


def test_the_first_prompt_position_has_no_logprobs() -> None:
    token = TokenLogprob(token_id=5, logprob=-0.25, rank=1)
    sent = (None, PositionLogprobs(token=token))
    assert wire_results.logprobs_from_proto(wire_results.logprobs_to_proto(sent)) == sent


def test_usage_adds_up() -> None:
    message = wire_results.usage_to_proto(Usage(prompt_tokens=3, completion_tokens=4))
    assert message.total_tokens == 7
    assert wire_results.usage_from_proto(message) == Usage(prompt_tokens=3, completion_tokens=4)


def test_a_model_is_described_by_its_limits() -> None:
    limits = EngineLimits(model="tiny", vocab_size=320, max_context=512, max_waiting=1, max_n=4, max_logprobs=5)
    card = wire_results.model_to_proto(limits, has_tokenizer=True)
    assert card == types_pb2.Model(
        name="models/tiny",
        vocab_size=320,
        max_context_tokens=512,
        max_num_sequences=4,
        max_logprobs=5,
        has_tokenizer=True,
    )
