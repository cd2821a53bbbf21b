"""Several streams become one: resumed after what was received, or repeated without what was given."""

from typing import Any

import pytest

from llama4_dist.client.options import ConnectOptions
from llama4_dist.client.progress import Progress
from llama4_dist.client.results import Delta
from llama4_dist.client.retry import Attempts
from llama4_dist.errors import (
    DuplicateRequestError,
    EngineError,
    InvalidRequestError,
    Llama4Error,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from llama4_dist.request import Sampling
from llama4_dist.rpc.wire import generate_to_proto
from llama4_dist.v1 import inference_pb2, types_pb2

BROKEN = UnavailableError("connection reset", reason="TRANSPORT")
UNKNOWN = NotFoundError("no such request")


def progress(max_attempts: int = 3, **sampling: Any) -> Progress:
    chosen = Sampling(**sampling)
    request = generate_to_proto([1], chosen, model="", request_id="mine", priority=3)
    message = inference_pb2.StreamGenerateRequest(request=request)
    return Progress(message, chosen, Attempts(ConnectOptions(max_attempts=max_attempts), None))


def started(seed: int = 77, request_id: str = "mine") -> inference_pb2.StreamGenerateResponse:
    return inference_pb2.StreamGenerateResponse(started=types_pb2.Started(request_id=request_id, seed=seed))


def said(token_ids: str, text: str | None = None, index: int = 0) -> inference_pb2.StreamGenerateResponse:
    """A delta whose tokens are the letters' codes, with their text unless another is given."""
    return inference_pb2.StreamGenerateResponse(
        delta=types_pb2.TokenDelta(
            output_index=index,
            token_ids=token_ids.encode(),
            text=token_ids if text is None else text,
            logprobs=[
                types_pb2.PositionLogprobs(token=types_pb2.TokenLogprob(token_id=code, rank=1))
                for code in token_ids.encode()
            ],
        )
    )


def ended(index: int = 0, usage: int | None = None) -> inference_pb2.StreamGenerateResponse:
    finished = types_pb2.Finished(output_index=index, finish_reason=types_pb2.FINISH_REASON_LENGTH)
    message = inference_pb2.StreamGenerateResponse(finished=finished)
    if usage is not None:
        message.usage.completion_tokens = usage
    return message


def fed(one: Progress, *events: inference_pb2.StreamGenerateResponse) -> list[tuple[bytes, str]]:
    deltas = [delta for event in events if isinstance(delta := one.feed(event), Delta)]
    for delta in deltas:
        assert [position.token.token_id for position in delta.logprobs] == list(delta.token_ids)
    return [(bytes(delta.token_ids), delta.text) for delta in deltas if delta.finish_reason is None]


def test_a_broken_stream_is_resumed_after_what_was_received_of_each_sequence() -> None:
    one = progress(n=3)
    fed(one, started(), said("abc", "ab"), said("xy", index=2), said("d", "cd"))
    one.after(BROKEN)
    assert list(one.message.resume.next_token_index) == [4, 0, 2]
    assert (one.message.request.request_id, one.message.request.priority) == ("mine", 3)
    assert fed(one, started(), said("e"), said("z", index=2)) == [(b"e", "e"), (b"z", "z")]
    one.after(BROKEN)
    assert list(one.message.resume.next_token_index) == [5, 0, 3]


def test_a_failure_before_the_beginning_asks_for_the_same_again() -> None:
    one = progress()
    one.after(BROKEN)
    assert not one.message.HasField("resume")
    with pytest.raises(NotFoundError):
        one.after(UNKNOWN)


@pytest.mark.parametrize("answer", [UNKNOWN, DuplicateRequestError("has not ended yet")])
@pytest.mark.parametrize(
    "again",
    [
        [said("abcdef")],
        [said("abc", ""), said("def", "abcdef")],
        [said("a"), said("b"), said("cde", "cd"), said("f", "ef")],
        [said("abcd", "abc"), said("e", "d"), said("f", "ef")],
        [said(letter) for letter in "abcdef"],
    ],
)
def test_an_unknown_request_is_repeated_with_its_seed_and_what_was_given_is_left_out(
    again: list[inference_pb2.StreamGenerateResponse], answer: Llama4Error
) -> None:
    one = progress()
    given = fed(one, started(seed=2**64 - 1), said("abcd", "abc"))
    one.after(BROKEN)
    assert one.after(answer) == 0.0
    assert not one.message.HasField("resume")
    assert one.message.request.sampling.seed == 2**64 - 1
    assert one.message.request.request_id not in ("", "mine")
    given += fed(one, started(seed=2**64 - 1, request_id="other"), *again, ended(usage=6))
    assert b"".join(token_ids for token_ids, _ in given) == b"abcdef"
    assert "".join(text for _, text in given) == "abcdef"
    assert one.assembler.request_id == "mine"
    assert one.assembler.completion.text == "abcdef"
    assert one.assembler.completion.usage.completion_tokens == 6


def test_a_repeated_request_may_break_too_before_and_after_it_has_caught_up() -> None:
    one = progress(max_attempts=9)
    given = fed(one, started(), said("abcd"))
    one.after(BROKEN)
    one.after(UNKNOWN)
    given += fed(one, started(), said("ab"))
    one.after(BROKEN)
    assert list(one.message.resume.next_token_index) == [2]
    one.after(UNKNOWN)
    given += fed(one, started(), said("abc"))
    one.after(BROKEN)
    given += fed(one, started(), said("de"))
    one.after(BROKEN)
    assert list(one.message.resume.next_token_index) == [5]
    one.after(UNKNOWN)
    given += fed(one, started(), said("abcdef"))
    assert b"".join(token_ids for token_ids, _ in given) == b"abcdef"


@pytest.mark.parametrize(
    "again",
    [[said("abX")], [said("ab"), said("cX")], [said("abcd", "aXcd")], [said("abc"), ended()], [ended()]],
)
def test_what_comes_out_different_is_refused(again: list[inference_pb2.StreamGenerateResponse]) -> None:
    one = progress()
    fed(one, started(), said("abcd"))
    one.after(BROKEN)
    one.after(UNKNOWN)
    with pytest.raises(EngineError, match="different") as caught:
        fed(one, started(), *again)
    assert caught.value.reason == "REPEAT_DIVERGED"


def test_a_sequence_ends_once_however_often_it_is_told() -> None:
    one = progress(n=2)
    ends = [one.feed(event) for event in (started(), said("a"), ended())]
    one.after(BROKEN)
    ends += [one.feed(event) for event in (started(), ended(), said("b", index=1), ended(1, usage=2))]
    assert [end.index for end in ends if end is not None and end.finish_reason is not None] == [0, 1]
    assert [output.text for output in one.assembler.completion.outputs] == ["a", "b"]


def test_attempts_are_counted_anew_with_every_new_token_and_end_without() -> None:
    one = progress(max_attempts=3)
    fed(one, started())
    for _ in range(10):
        assert fed(one, said("a")) == [(b"a", "a")]
        one.after(BROKEN)
        one.after(EngineError("lost", reason="WORKER_LOST"))
    with pytest.raises(UnavailableError):
        one.after(BROKEN)


def test_overload_is_waited_for_and_a_wrong_request_is_not_sent_again() -> None:
    one = progress(max_attempts=9)
    fed(one, started(), said("a"))
    one.after(BROKEN)
    one.after(UNKNOWN)
    repeated = one.message
    assert one.after(OverloadedError("full", retry_after_s=0.5)) >= 0.5
    assert one.message is repeated
    with pytest.raises(InvalidRequestError):
        one.after(InvalidRequestError([]))
