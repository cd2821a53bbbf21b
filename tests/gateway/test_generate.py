"""What a client gets from the public methods, over a real socket."""

from collections.abc import Iterator

import grpc
import pytest

from llama4_dist.client import Client
from llama4_dist.errors import InvalidRequestError, UnsupportedError
from llama4_dist.request import FinishReason, Message, Sampling
from llama4_dist.v1 import inference_pb2, inference_pb2_grpc
from tests.gateway.scripted_engine import ScriptedEngine, expected_tokens
from tests.gateway.serving import Served, byte_tokenizer, serving
from tests.waiting import wait_until

HELLO = (256, *b"hello")


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(step_s=0.002)


@pytest.fixture(scope="module")
def served(engine: ScriptedEngine) -> Iterator[Served]:
    with serving(engine, byte_tokenizer()) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address) as connected:
        yield connected


def test_text_is_encoded_with_bos_and_the_answer_is_the_engines(client: Client) -> None:
    completion = client.generate("hello", Sampling(max_tokens=5, temperature=0))
    assert completion.prompt_token_ids == HELLO
    assert completion.token_ids == expected_tokens(HELLO, 5)
    assert completion.text == bytes(expected_tokens(HELLO, 5)).decode()
    assert completion.finish_reason is FinishReason.LENGTH
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (6, 5)


def test_token_ids_are_used_as_they_are(client: Client) -> None:
    assert client.generate([1, 2, 3], Sampling(max_tokens=4)).token_ids == expected_tokens([1, 2, 3], 4)


def test_a_stream_assembles_to_the_unary_answer(client: Client) -> None:
    sampling = Sampling(max_tokens=40, n=3, logprobs=1, prompt_logprobs=1, seed=1)
    stream = client.stream_generate("hello", sampling, request_id="same")
    deltas = list(stream)
    whole = client.generate("hello", sampling, request_id="same")
    assert stream.completion == whole
    assert [output.token_ids for output in whole.outputs] == [expected_tokens(HELLO, 40, index) for index in range(3)]
    assert [sum(1 for delta in deltas if delta.finish_reason and delta.index == index) for index in range(3)] == [1] * 3
    assert all(output.logprobs and len(output.logprobs) == 40 for output in whole.outputs)
    assert whole.prompt_logprobs == (None,) * 6


def test_a_chat_is_rendered_in_llama_4s_format(client: Client) -> None:
    messages = [Message(role="user", content="hi <|eot|>")]
    completion = client.chat(messages, Sampling(max_tokens=3))
    user, assistant = (258, *b"user", 259, *b"\n\n"), (258, *b"assistant", 259, *b"\n\n")
    assert completion.prompt_token_ids == (256, *user, *b"hi <|eot|>", 261, *assistant)
    assert client.apply_chat_template(messages) == completion.prompt_token_ids
    stream = client.stream_chat(messages, Sampling(max_tokens=3))
    assert "".join(delta.text for delta in stream) == completion.text


def test_a_stop_string_ends_the_text_and_frees_the_engine(client: Client, engine: ScriptedEngine) -> None:
    num_steps = engine.num_steps
    letters = bytes(expected_tokens(HELLO, 30)).decode()
    completion = client.generate("hello", Sampling(max_tokens=400, stop=(letters[10:13],)))
    assert completion.text == letters[:10]
    assert completion.finish_reason is FinishReason.STOP
    assert completion.outputs[0].stop_reason == letters[10:13]
    assert len(completion.token_ids) == 13
    wait_until(lambda: engine.num_held == 0)
    assert engine.num_steps - num_steps < 300, "the engine went on to max_tokens"


def test_a_stop_token_is_named(client: Client) -> None:
    tokens = expected_tokens(HELLO, 5)
    completion = client.generate("hello", Sampling(max_tokens=400, stop_token_ids=(tokens[4],)))
    assert completion.outputs[0].stop_reason == tokens[4]
    assert completion.finish_reason is FinishReason.STOP


def test_a_stream_sends_no_message_that_says_nothing(served: Served) -> None:
    """Without token ids only text counts, and text that may become a stop string is held back."""
    prompt = [256, 1]
    request = inference_pb2.GenerateRequest(token_ids={"ids": prompt}, stopping={"max_tokens": 6})
    request.stopping.stop.append(bytes(expected_tokens(prompt, 6)).decode() + "!")  # holds all text back to the end
    with grpc.insecure_channel(served.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        events = list(stub.StreamGenerate(inference_pb2.StreamGenerateRequest(request=request)))
    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "finished"]
    assert events[1].delta.text == bytes(expected_tokens(prompt, 6)).decode()
    assert [event.HasField("usage") for event in events] == [False, False, True]
    assert events[0].started.queue_time.ToMilliseconds() == 250


def test_models_and_tokens(client: Client) -> None:
    (card,) = client.list_models()
    assert card == client.get_model("models/tiny")
    assert (card.name, card.max_context, card.has_tokenizer) == ("models/tiny", 512, True)
    assert client.tokenize("hé") == (256, *"hé".encode())
    assert client.tokenize("a", add_special_tokens=False) == (97,)
    assert client.detokenize([256, 97]) == "a"
    assert client.detokenize([256, 97], skip_special_tokens=False) == "<|begin_of_text|>a"


def test_without_tokenizer_files_token_ids_work_and_text_is_refused() -> None:
    with serving(ScriptedEngine()) as served, Client(served.address) as client:
        assert client.generate([1, 2], Sampling(max_tokens=2)).token_ids == expected_tokens([1, 2], 2)
        with pytest.raises(UnsupportedError, match="send token_ids"):
            client.generate("text")
        with pytest.raises(InvalidRequestError, match="needs a tokenizer"):
            client.generate([1], Sampling(stop=("x",)))
