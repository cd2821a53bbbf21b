"""Bad requests and the codes they must be answered with; numbers in the names only order the list."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from llama4_dist.v1 import inference_pb2 as pb
from llama4_dist.v1 import tokenizer_pb2, types_pb2

Code = grpc.StatusCode
BAD = frozenset({Code.INVALID_ARGUMENT})
UNBUILT = frozenset({Code.UNIMPLEMENTED})
TOO_BIG = frozenset({Code.RESOURCE_EXHAUSTED})
FINE = frozenset({Code.OK})
INFERENCE = "/llama4_dist.v1.InferenceService/"
TOKENIZER = "/llama4_dist.v1.TokenizerService/"
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
UNARY = [INFERENCE + name for name in ("Generate", "Chat", "ListModels", "GetModel")] + [
    TOKENIZER + name for name in ("Tokenize", "Detokenize", "ApplyChatTemplate")
]
STREAMING = [INFERENCE + "StreamGenerate", INFERENCE + "StreamChat"]
VOCAB = 320
CONTEXT = 512


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request: raw bytes to a method, and the codes that are right."""

    name: str
    codes: frozenset[grpc.StatusCode]
    method: str = INFERENCE + "Generate"
    data: bytes = b""
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    compression: grpc.Compression = grpc.Compression.NoCompression
    timeout_s: float = 20.0


def generate(**fields: Any) -> pb.GenerateRequest:
    """A short valid request with some fields changed."""
    fields.setdefault("stopping", {})
    fields["stopping"] = {"max_tokens": 2, **fields["stopping"]}
    if "text" not in fields and "token_ids" not in fields:
        fields["token_ids"] = {"ids": [1, 2, 3]}
    return pb.GenerateRequest(**fields)


def chat(messages: list[tuple[int, str]], **fields: Any) -> Case:
    """A chat; INVALID_ARGUMENT unless told otherwise."""
    codes = fields.pop("codes", BAD)
    name = fields.pop("name")
    said = [types_pb2.ChatMessage(role=role, content=content) for role, content in messages]  # type: ignore[arg-type]
    request = pb.ChatRequest(messages=said, stopping={"max_tokens": 2}, **fields)
    return Case(name=name, codes=codes, method=INFERENCE + "Chat", data=request.SerializeToString())


def case(name: str, codes: frozenset[grpc.StatusCode] = BAD, **fields: Any) -> Case:
    """A Generate call."""
    return Case(name=name, codes=codes, data=generate(**fields).SerializeToString())


def malformed() -> Iterator[Case]:
    """R01-R04: bytes that are no message, for every method."""
    rng = random.Random(1)
    valid = generate(text="hello").SerializeToString()
    for method in (*UNARY, *STREAMING, HEALTH + "Check", HEALTH + "Watch", REFLECTION):
        for size in (1, 9, 200, 5000):
            yield Case(name=f"R01 {size} random bytes", codes=BAD, method=method, data=b"\xff" + rng.randbytes(size))
        yield Case(name="R04 nested groups", codes=BAD, method=method, data=b"\x0b" * 10_000)
        yield Case(name="R04 unknown field", codes=BAD, method=method, data=b"\xc2\x3e\x03abc")
    for cut in (len(valid) - 1, len(valid) // 2):
        yield Case(name="R02 truncated", codes=BAD, data=valid[:cut])
    yield Case(name="R03 invalid UTF-8 text", codes=BAD, data=b"\x1a\x02\xff\xfe")
    yield Case(name="R03 invalid UTF-8 model", codes=BAD, data=b"\x0a\x01\xff" + valid)
    yield Case(name="R04 many unknown fields", codes=BAD, data=valid + b"\xc2\x3e\x00" * 10_000)
    nested = b"\x4a\x04\x0a\x02\xf8\x7f"
    yield Case(name="R04 unknown field inside", codes=BAD, data=valid + nested)


def transport() -> Iterator[Case]:
    """R05-R11: sizes, encodings, names, metadata."""
    limit = 4 * 1024 * 1024
    yield Case(name="R05 over the message limit", codes=TOO_BIG, data=generate(text="a" * limit).SerializeToString())
    for encoding in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        data = generate(text="a" * 1000).SerializeToString()
        yield Case(name=f"R06 {encoding.name}", codes=UNBUILT, data=data, compression=encoding)
    bomb = generate(text="\0" * (48 * 1024 * 1024)).SerializeToString()
    yield Case(name="R07 gzip bomb", codes=UNBUILT, data=bomb, compression=grpc.Compression.Gzip)
    for method in ("Nothing", "generate", "../Generate", ""):
        yield Case(name="R08 unknown method", codes=UNBUILT, method=INFERENCE + method)
    yield Case(name="R08 unknown service", codes=UNBUILT, method="/no.such.Service/Method")
    yield Case(name="R57 debug method", codes=UNBUILT, method="/llama4_dist.v1.DebugService/Profile")
    data = generate().SerializeToString()
    huge = (("x-large", "a" * 65536),)
    yield Case(name="R11 64 KB of metadata", codes=TOO_BIG, data=data, metadata=huge)
    many = tuple((f"x-key-{index}", "v") for index in range(1000))
    yield Case(name="R11 1000 keys", codes=TOO_BIG, data=data, metadata=many)


def prompts() -> Iterator[Case]:
    """R12-R17, R48: what is asked."""
    yield Case(name="R12 no prompt", codes=BAD, data=pb.GenerateRequest().SerializeToString())
    yield Case(name="R12 empty message", codes=BAD, method=STREAMING[0])
    yield case("R12 empty text", text="")
    yield case("R12 no token", token_ids={"ids": []})
    for token_id in (-1, VOCAB, 2**31 - 1, -(2**31)):
        yield case(f"R14 token {token_id}", token_ids={"ids": [1, token_id]})
    yield case("R15 special tokens as text", FINE, text="<|eot|><|begin_of_text|>")
    yield case("R16 prompt fills the context", token_ids={"ids": [1] * CONTEXT})
    yield case("R16 prompt above the context", token_ids={"ids": [1] * (CONTEXT + 1)})
    yield case("R16 ten million ids", TOO_BIG, token_ids={"ids": [1] * 10_000_000})
    yield case("R16 a million ids", token_ids={"ids": [1] * 1_000_000})
    yield case("R17 prompt and max_tokens above the context", stopping={"max_tokens": CONTEXT - 1})
    for name, text in (
        ("one character", "a" * 1_000_000),
        ("spaces", " " * 1_000_000),
        ("joiners", "\u200d" * 300_000),
        ("right to left", "\u202e" * 300_000),
    ):
        yield case(f"R48 {name}", text=text)
    yield case("R48 NUL", FINE, text="a\0b")
    yield case("an image link is only text", FINE, text="![x](http://127.0.0.1:1/)")


def sampling() -> Iterator[Case]:
    """R18-R28, R38-R40: numbers."""
    nan, inf = math.nan, math.inf
    for field, values in {
        "temperature": (-1, nan, inf, -inf, 1e38),
        "top_p": (0, -0.1, 1.1, nan),
        "min_p": (-0.1, 1.1, nan, inf),
        "repetition_penalty": (0, -1, nan, 1e9, inf),
        "presence_penalty": (nan, inf, -1e9),
        "frequency_penalty": (nan, inf, 1e9),
        "top_k": (-2, -(2**31)),
        "num_sequences": (0, -1, 9, 2**31 - 1),
    }.items():
        for value in values:
            yield case(f"R19-R23 {field} {value}", sampling={field: value})
    for field, values in {"max_tokens": (0, -1, 2**31 - 1), "min_tokens": (-1, 3, 2**31 - 1)}.items():
        for value in values:
            yield case(f"R18 R26 {field} {value}", stopping={field: value})
    for value in (-1, 129, 10**6):
        yield case(f"R38 logprobs {value}", response={"logprobs": value})
        yield case(f"R38 prompt_logprobs {value}", response={"prompt_logprobs": value})
    for token_id in (-1, VOCAB):
        yield case(f"R25 stop token {token_id}", stopping={"stop_token_ids": [token_id]})
        yield case(f"R39 allowed token {token_id}", sampling={"allowed_token_ids": {"ids": [token_id]}})
        yield case(f"R39 bad token {token_id}", sampling={"bad_token_ids": [token_id]})
        yield case(f"R40 biased token {token_id}", sampling={"logit_bias": {token_id: 1.0}})
    yield case("R39 no token allowed", sampling={"allowed_token_ids": {"ids": []}})
    yield case("R40 NaN bias", sampling={"logit_bias": {1: nan}})
    yield case("R40 100 000 biases", sampling={"logit_bias": dict.fromkeys(range(100_000), 1.0)})
    yield case("R24 1000 stop strings", stopping={"stop": [str(index) for index in range(1000)]})
    yield case("R24 empty stop string", stopping={"stop": [""]})
    yield case("R24 long stop string", stopping={"stop": ["a" * 1_000_000]})
    yield case("R19 denormal temperature is greedy", FINE, sampling={"temperature": 1e-45})
    yield case("R21 top_k off and above the vocabulary", FINE, sampling={"top_k": VOCAB + 80})
    yield case("R27 seed with greedy", FINE, sampling={"temperature": 0, "seed": 2**64 - 1})


def names() -> Iterator[Case]:
    """R29-R30, R49: ids, models, priorities."""
    yield case("R29 unknown model", frozenset({Code.NOT_FOUND}), model="models/other")
    yield case("R29 long model", model="m" * 10_240)
    yield case("R29 path as model", model="../../etc/passwd")
    yield case("R29 model with a line break", model="tiny\r\nx")
    yield case("R30 generated id", FINE)
    yield case("R30 long id", request_id="r" * 300)
    yield case("R30 id with a line break", request_id="a\r\nset-cookie: b")
    yield case("R30 id with NUL", request_id="a\0b")
    yield case("R30 id that is not ASCII", request_id="日本")
    yield case("R49 priority", priority=101)
    yield case("R49 priority", priority=-(2**31))
    unknown = pb.GetModelRequest(name="models/other").SerializeToString()
    yield Case(name="R29 get", codes=frozenset({Code.NOT_FOUND}), method=INFERENCE + "GetModel", data=unknown)
    pages: list[dict[str, Any]] = [{"page_size": -1}, {"page_token": "forged"}]
    for fields in pages:
        page = pb.ListModelsRequest(**fields).SerializeToString()
        yield Case(name=f"page {fields}", codes=BAD, method=INFERENCE + "ListModels", data=page)


def reserved() -> Iterator[Case]:
    """R41-R46, R50-R51: what is not built is never ignored."""
    unbuilt: list[dict[str, Any]] = [
        {"structured_output": {"regex": "(a+)+$"}},
        {"structured_output": {"json_schema": "{}"}},
        {"structured_output": {}},
        {"media": [{"modality": 1, "raw_bytes": b"\x89PNG"}]},
        {"cache_salt": "s" * 1_000_000},
        {"lora_adapter": "../../adapter"},
        {"prompt_embeds": b"\0" * 1000},
        {"chat_template": "{{ 1 }}"},
        {"tools": ["{"]},
    ]
    for fields in unbuilt:
        yield case(f"R41-R51 {sorted(fields)}", UNBUILT, reserved=fields)


def chats() -> Iterator[Case]:
    """R47: conversations."""
    user, assistant = types_pb2.ROLE_USER, types_pb2.ROLE_ASSISTANT
    yield chat([], name="R47 no messages")
    yield chat([(0, "hi")], name="R47 no role")
    yield chat([(99, "hi")], name="R47 unknown role")
    yield chat([(-1, "hi")], name="R47 negative role")
    yield chat([(assistant, "hi")], name="R47 assistant first")
    yield chat([(user, "x")] * 100_000, name="R47 100 000 messages")
    yield chat([(user, "x" * 1_000_000)], name="R48 long chat")
    yield chat([(user, "")], name="R47 empty content", codes=FINE)


def tokens() -> Iterator[Case]:
    """TokenizerService."""
    method = TOKENIZER + "Detokenize"
    for token_id in (-1, VOCAB):
        data = tokenizer_pb2.DetokenizeRequest(token_ids=[token_id]).SerializeToString()
        yield Case(name=f"detokenize {token_id}", codes=BAD, method=method, data=data)
    yield Case(name="tokenize nothing", codes=BAD, method=TOKENIZER + "Tokenize")
    yield Case(name="apply nothing", codes=BAD, method=TOKENIZER + "ApplyChatTemplate")
    missing = b"\x0a\x07nothing"
    yield Case(name="R59 health", codes=frozenset({Code.NOT_FOUND}), method=HEALTH + "Check", data=missing)


def all_cases() -> list[Case]:
    """Every case, in order."""
    groups = (malformed, transport, prompts, sampling, names, reserved, chats, tokens)
    return [one for group in groups for one in group()]
