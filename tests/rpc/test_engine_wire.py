"""Requests and outputs ⇄ messages."""

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_dist import errors
from llama4_dist.engine.port import EngineStats
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
from llama4_dist.rpc import engine_wire as wire

ids = st.lists(st.integers(0, 202047), max_size=4).map(tuple)
real = st.floats(-1e3, 1e3)
samplings = st.builds(
    Sampling,
    temperature=real, top_p=real, min_p=real, presence_penalty=real, frequency_penalty=real, repetition_penalty=real,
    top_k=st.integers(-1, 2**31 - 1),
    seed=st.none() | st.integers(0, 2**64 - 1),
    max_tokens=st.none() | st.integers(0, 9), min_tokens=st.integers(0, 9),
    stop=st.lists(st.text(max_size=5), max_size=3).map(tuple), stop_token_ids=ids, bad_token_ids=ids,
    include_stop_str_in_output=st.booleans(), ignore_eos=st.booleans(), skip_special_tokens=st.booleans(),
    logprobs=st.none() | st.integers(0, 20), prompt_logprobs=st.none() | st.integers(0, 20),
    logit_bias=st.dictionaries(st.integers(0, 99), real, max_size=3), allowed_token_ids=st.none() | ids,
)  # fmt: skip
requests = st.builds(
    EngineRequest,
    request_id=st.text(min_size=1, max_size=8), prompt_token_ids=ids, sampling=samplings,
    sequence_index=st.integers(0, 7), output_token_ids=ids, timeout_s=st.none() | st.floats(0, 1e6),
    priority=st.integers(-9, 9), digest=st.binary(max_size=32),
)  # fmt: skip
tokens = st.builds(TokenLogprob, token_id=st.integers(0, 99), logprob=st.floats(-50, 0), rank=st.integers(1, 99))
positions = st.builds(PositionLogprobs, token=tokens, top=st.lists(tokens, max_size=2).map(tuple))
outputs = st.builds(
    TokenOutput,
    request_id=st.text(min_size=1, max_size=8), token_ids=ids,
    logprobs=st.none() | st.lists(positions, max_size=2).map(tuple),
    prompt_logprobs=st.none() | st.lists(st.none() | positions, max_size=3).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason), stop_token_id=st.none() | st.integers(0, 99),
    queue_s=st.none() | st.floats(0, 9), attached_tokens=st.none() | st.integers(0, 99),
)  # fmt: skip


@given(requests)
def test_a_request_survives_the_wire_unchanged(request: EngineRequest) -> None:
    message = pb.SubmitCommand.FromString(wire.request_to_wire(request).SerializeToString())
    assert wire.request_from_wire(message) == request


@given(outputs)
def test_an_output_survives_the_wire_unchanged(output: TokenOutput) -> None:
    message = pb.TokenOutput.FromString(wire.output_to_wire(output).SerializeToString())
    assert wire.output_from_wire(message) == output


@pytest.mark.parametrize("kind", sorted(wire.ERROR_KINDS))
def test_every_error_of_the_tree_survives_the_wire(kind: str) -> None:
    error_class = wire.ERROR_KINDS[kind]
    error: errors.Llama4Error
    if error_class is errors.InvalidRequestError:
        error = errors.InvalidRequestError([errors.FieldViolation(field="top_p", description="above 1")])
    elif error_class is errors.CheckpointError:
        error = errors.CheckpointError("damaged", file="a.safetensors", tensor="w")
    else:
        error = error_class("why", reason="SOME_REASON", metadata={"limit": "3"}, retry_after_s=0.25)
    again = wire.error_from_wire(pb.Error.FromString(wire.error_to_wire(error).SerializeToString()))
    assert type(again) is error_class
    assert vars(again) == vars(error)
    assert str(again) == str(error)


def test_an_unknown_kind_of_error_is_an_engine_error() -> None:
    assert type(wire.error_from_wire(pb.Error(kind="os.system", message="x"))) is errors.EngineError


def test_limits_and_stats_survive_the_wire_with_every_field() -> None:
    given: dict[str, Any] = {f.name: 11 + i for i, f in enumerate(fields(EngineLimits))}
    limits = EngineLimits(**given | {"model": "m"})
    assert wire.limits_from_wire(wire.limits_to_wire(limits)) == limits
    numbers: dict[str, Any] = {
        f.name: 11 + i for i, f in enumerate(fields(EngineStats)) if f.name not in wire.STATS_MAPS
    }
    maps: dict[str, Any] = {name: {name: "tcp" if name == "host_transports" else 5} for name in wire.STATS_MAPS}
    stats = EngineStats(**numbers, **maps)
    assert wire.stats_from_wire(wire.stats_to_wire(stats)) == stats
