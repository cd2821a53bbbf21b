"""A request becomes n engine requests, and their outputs become text, events and one completion."""

from typing import Any

import pytest

from llama4_dist.errors import InvalidRequestError, UnavailableError
from llama4_dist.request import EngineLimits, FinishReason, PositionLogprobs, Sampling, TokenLogprob, TokenOutput
from llama4_dist.text.output_sequence import Delta, Finished
from llama4_dist.text.request_state import RequestState
from llama4_dist.text.tokenizer import Tokenizer

LIMITS = EngineLimits(model="tiny", vocab_size=300, max_context=50, max_waiting=4)
# One id per byte; 256 begins a text, 257 ends a turn.
BYTES = Tokenizer(
    [bytes([byte]) for byte in range(256)], {"<|begin_of_text|>": 256, "<|eot|>": 257}, lambda text: list(text.encode())
)


def state(tokenizer: Tokenizer | None = BYTES, **sampling: Any) -> RequestState:
    return RequestState(
        request_id="r", prompt_token_ids=[256, 65], sampling=Sampling(**sampling), limits=LIMITS, tokenizer=tokenizer
    )


def said(text: str, index: int = 0, **fields: Any) -> TokenOutput:
    return TokenOutput(request_id=f"r/{index}", token_ids=tuple(text.encode()), **fields)


def logprob(token_id: int) -> PositionLogprobs:
    return PositionLogprobs(token=TokenLogprob(token_id=token_id, logprob=-1.0, rank=1))


def test_n_sequences_share_prompt_and_seed_and_differ_in_index() -> None:
    requests = state(n=3, temperature=0.7).engine_requests()
    assert [request.request_id for request in requests] == ["r/0", "r/1", "r/2"]
    assert [request.sequence_index for request in requests] == [0, 1, 2]
    assert {request.prompt_token_ids for request in requests} == {(256, 65)}
    assert {request.sampling.n for request in requests} == {1}
    seeds = {request.sampling.seed for request in requests}
    assert len(seeds) == 1
    assert None not in seeds
    assert {request.sampling.seed for request in state(n=1).engine_requests()} != seeds


def test_what_the_caller_left_open_is_fixed() -> None:
    (request,) = state(seed=5, temperature=1e-9, stop=("x",), prompt_logprobs=1).engine_requests()
    assert (request.sampling.seed, request.sampling.temperature, request.sampling.max_tokens) == (5, 0.0, 48)
    assert request.sampling.stop == ()
    assert request.sampling.prompt_logprobs == 1


def test_the_prompt_is_asked_about_once() -> None:
    asked = state(n=2, prompt_logprobs=1)
    assert [r.sampling.prompt_logprobs for r in asked.engine_requests()] == [1, None]
    asked.push(said("a", prompt_logprobs=(None, logprob(65))))
    assert [r.sampling.prompt_logprobs for r in asked.engine_requests()] == [None, None]
    assert asked.completion().prompt_logprobs == (None, logprob(65))


@pytest.mark.parametrize("fields", [{"n": 0}, {"max_tokens": 49}, {"temperature": -1.0}])
def test_a_wrong_request_never_becomes_one(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        state(**fields)


def test_deltas_join_to_the_completion() -> None:
    running = state(logprobs=0)
    first = running.push(said("h", logprobs=(logprob(104),), queue_s=0.5))
    assert first == (Delta(index=0, text="h", token_ids=(104,), logprobs=(logprob(104),)),)
    assert running.push(TokenOutput(request_id="r/0", token_ids=(0xC3,), logprobs=(logprob(0xC3),))) == (
        Delta(index=0, text="", token_ids=(0xC3,), logprobs=(logprob(0xC3),)),
    )
    last = running.push(
        TokenOutput(request_id="r/0", token_ids=(0xA9,), logprobs=(logprob(0xA9),), finish_reason=FinishReason.LENGTH)
    )
    assert last == (
        Delta(index=0, text="é", token_ids=(0xA9,), logprobs=(logprob(0xA9),)),
        Finished(index=0, finish_reason=FinishReason.LENGTH),
    )
    completion = running.completion()
    assert (completion.text, completion.token_ids) == ("hé", (104, 0xC3, 0xA9))
    assert [entry.token.token_id for entry in completion.logprobs or ()] == [104, 0xC3, 0xA9]
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2, 3)
    assert (running.done, running.queue_s) == (True, 0.5)


def test_a_stop_string_ends_one_sequence_and_tells_whom_to_abort() -> None:
    running = state(n=2, stop=("STOP",), logprobs=0)
    assert running.push(said("say S", logprobs=tuple(map(logprob, b"say S")))) == (
        Delta(index=0, text="say ", token_ids=tuple(b"say S"), logprobs=tuple(map(logprob, b"say S"))),
    )
    events = running.push(said("TOP it", logprobs=tuple(map(logprob, b"TOP it"))))
    assert events == (
        Delta(index=0, text="", token_ids=tuple(b"TOP"), logprobs=tuple(map(logprob, b"TOP"))),
        Finished(index=0, finish_reason=FinishReason.STOP, stop_reason="STOP", abort="r/0"),
    )
    assert running.running == ("r/1",)
    assert running.push(said("more", finish_reason=FinishReason.CANCELLED)) == ()
    assert running.push(said("ok STOP", index=1, finish_reason=FinishReason.LENGTH))[-1] == Finished(
        index=1, finish_reason=FinishReason.STOP, stop_reason="STOP", abort=None
    )
    completion = running.completion()
    assert [output.text for output in completion.outputs] == ["say ", "ok "]
    assert completion.usage.completion_tokens == len("say STOP") + len("ok STOP")


def test_held_text_is_released_when_the_sequence_ends() -> None:
    running = state(stop=("STOP",))
    assert running.push(said("x ST"))[0] == Delta(index=0, text="x ", token_ids=tuple(b"x ST"))
    assert running.push(TokenOutput(request_id="r/0", finish_reason=FinishReason.LENGTH)) == (
        Delta(index=0, text="ST"),
        Finished(index=0, finish_reason=FinishReason.LENGTH),
    )


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "a.")])
def test_the_end_token_counts_but_is_no_text(include: bool, text: str) -> None:
    running = state(stop_token_ids=(46,), include_stop_str_in_output=include)
    running.push(said("a.", finish_reason=FinishReason.STOP, stop_token_id=46))
    output = running.completion().outputs[0]
    assert (output.text, output.token_ids, output.stop_reason) == (text, (97, 46), 46)


def test_an_error_is_raised_and_leaves_the_other_sequences_to_abort() -> None:
    running = state(n=3)
    with pytest.raises(UnavailableError, match="gone"):
        running.push(TokenOutput(request_id="r/1", error=UnavailableError("the host is gone")))
    assert running.running == ("r/0", "r/2")


def test_a_replay_continues_after_the_tokens_already_emitted() -> None:
    running = state(n=2, stop=("!",))
    seed = running.engine_requests()[0].sampling.seed
    running.push(said("abc"))
    running.push(said("d!", index=1))
    (replay,) = running.engine_requests()
    assert (replay.request_id, replay.output_token_ids, replay.sampling.seed) == ("r/0", tuple(b"abc"), seed)
    assert replay.sampling.max_tokens == 48
    running.push(said("d", finish_reason=FinishReason.LENGTH))
    assert running.completion().text == "abcd"


def test_without_a_tokenizer_there_are_ids_and_no_text() -> None:
    running = state(tokenizer=None)
    running.push(TokenOutput(request_id="r/0", token_ids=(7, 257), finish_reason=FinishReason.STOP, stop_token_id=257))
    assert (running.completion().text, running.completion().token_ids) == ("", (7, 257))
    with pytest.raises(InvalidRequestError, match="stop: needs a tokenizer"):
        state(tokenizer=None, stop=("x",))


def test_a_sequence_cut_off_counts_as_cancelled() -> None:
    running = state()
    running.push(said("half"))
    assert running.completion().outputs[0].finish_reason is FinishReason.CANCELLED
