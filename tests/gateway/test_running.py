"""The record of a running request, without a server."""

from llama4_dist.errors import UnavailableError
from llama4_dist.gateway.running import RunningRequest, coalesced
from llama4_dist.request import EngineLimits, FinishReason, PositionLogprobs, Sampling, TokenLogprob, TokenOutput
from llama4_dist.text.output_sequence import Delta, Finished
from llama4_dist.text.request_state import RequestState

LIMITS = EngineLimits(model="tiny", vocab_size=100, max_context=64, max_waiting=8)


def running(sampling: Sampling) -> RunningRequest:
    state = RequestState(
        request_id="internal", prompt_token_ids=[1, 2], sampling=sampling, limits=LIMITS, tokenizer=None
    )
    return RunningRequest("client", state, body=b"", now_s=0.0)


def test_a_stream_begins_only_when_the_prompts_logprobs_are_there() -> None:
    """Only sequence 0 is asked about the prompt, and another may be first to speak."""
    request = running(Sampling(n=2, prompt_logprobs=0, max_tokens=4))
    request.take(TokenOutput(request_id="internal/1", token_ids=(5,)))
    assert not request.begun
    request.take(TokenOutput(request_id="internal/0", token_ids=(6,), prompt_logprobs=(None, None)))
    assert request.begun


def test_a_failure_before_the_first_token_begins_no_stream() -> None:
    request = running(Sampling(max_tokens=4))
    request.take(TokenOutput(request_id="internal/0", error=UnavailableError("gone")))
    assert request.done
    assert not request.begun


def test_the_first_failure_is_the_requests() -> None:
    request = running(Sampling(n=2, max_tokens=4))
    first, second = UnavailableError("one"), UnavailableError("two")
    request.take(TokenOutput(request_id="internal/0", error=first))
    request.take(TokenOutput(request_id="internal/1", error=second))
    assert request.error is first


def position(token_id: int) -> PositionLogprobs:
    return PositionLogprobs(token=TokenLogprob(token_id=token_id, logprob=0.0, rank=1))


def test_deltas_of_a_sequence_join_in_order_and_before_its_end() -> None:
    events: list[Delta | Finished] = [
        Delta(index=1, text="a", token_ids=(1,), logprobs=(position(1),)),
        Delta(index=0, text="x", token_ids=(7,), logprobs=(position(7),)),
        Delta(index=1, text="b", token_ids=(2,), logprobs=(position(2),)),
        Finished(index=1, finish_reason=FinishReason.STOP),
        Delta(index=0, text="y", token_ids=(8,), logprobs=(position(8),)),
    ]
    assert coalesced(events) == [
        Delta(index=1, text="ab", token_ids=(1, 2), logprobs=(position(1), position(2))),
        Delta(index=0, text="xy", token_ids=(7, 8), logprobs=(position(7), position(8))),
        Finished(index=1, finish_reason=FinishReason.STOP),
    ]


def test_nothing_joins_to_nothing() -> None:
    assert coalesced([]) == []
    assert coalesced([Delta(index=0, text="a")]) == [Delta(index=0, text="a")]
