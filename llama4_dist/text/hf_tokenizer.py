"""Reads tokenizer.json (the `tokenizers` library's format) of a byte-level BPE.

Such a file is a program: it may replace, normalise, drop, truncate or loop. What Llama 4 does not use is refused, and
what is left must give a probe back byte for byte.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from llama4_dist.text.files import broken, read_bounded
from llama4_dist.text.panics import raised_instead_of_a_panic
from llama4_dist.text.patterns import may_take_exponential_time
from llama4_dist.text.tokenizer import BOS, Tokenizer

MAX_IDS = 1 << 22
MAX_PATTERN_CHARS = 4096
# Upper case, blanks and line ends at both ends, a composed and a decomposed letter, and the longest characters.
PROBE = " \t Probe, 12345 don't\r\n\n\x00 \u00e9 e\u0301 \u6f22\u5b57 \u200d\U0001f9e0 \U0010ffff  \n "


def read_hf_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json; CheckpointError names the file and the part that is wrong."""
    content = read_bounded(path)
    try:
        parts = json.loads(content)
        for problem in _problems(parts):
            raise broken(path, problem)
        special_tokens: dict[str, int] = {token["content"]: token["id"] for token in parts["added_tokens"]}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise broken(path, f"is not the JSON of a tokenizer ({type(error).__name__})") from error
    with raised_instead_of_a_panic(broken(path, "the tokenizers library refuses it")):
        library = tokenizers.Tokenizer.from_buffer(content)
    library.encode_special_tokens = True  # text never becomes a control token
    library.no_truncation()
    library.no_padding()

    def encode(text: str) -> list[int]:
        return list(library.encode(text, add_special_tokens=False).ids)

    for name, token_id in special_tokens.items():
        # The library gives an added token another id, without a word, where the file's is taken.
        if library.token_to_id(name) != token_id:
            raise broken(path, f"gives {name!r} the id {token_id}, which is another token's or leaves a gap")
    if BOS not in special_tokens:
        raise broken(path, f"has no special token {BOS}")
    pieces = _pieces(path, library.get_vocab(with_added_tokens=False), special_tokens)
    tokenizer = Tokenizer(pieces, special_tokens, encode, file=path.name)
    _probe(path, tokenizer)
    return tokenizer


def _problems(parts: Mapping[str, Any]) -> Iterator[str]:
    model = parts["model"]
    if model.get("type", "BPE") != "BPE" or model.get("dropout"):
        yield "its model is not a BPE without dropout"
    if parts.get("normalizer") is not None:
        yield "has a normalizer, which Llama 4 does not use"
    for step in _steps(parts.get("pre_tokenizer")):
        if step["type"] not in ("Split", "ByteLevel"):
            yield f"has a pre-tokenizer {step['type']!r}; only Split and ByteLevel are allowed"
        pattern = step.get("pattern", {}).get("Regex", "")
        if len(pattern) > MAX_PATTERN_CHARS or may_take_exponential_time(pattern):
            yield "its split pattern may take exponential time: it repeats a choice, or is too long"
    ids = [*model["vocab"].values(), *(token["id"] for token in parts["added_tokens"])]
    if not all(type(token_id) is int and 0 <= token_id < MAX_IDS for token_id in ids):
        yield f"has a token id outside 0 to {MAX_IDS - 1}"
    if len(set(model["vocab"].values())) != len(model["vocab"]):
        yield "gives one id to two tokens"


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return
    if pre_tokenizer["type"] == "Sequence":
        for step in pre_tokenizer["pretokenizers"]:
            yield from _steps(step)
    else:
        yield pre_tokenizer


def _pieces(path: Path, vocabulary: Mapping[str, int], special_tokens: Mapping[str, int]) -> list[bytes]:
    byte_of = _byte_of_character()
    if not vocabulary.keys() >= byte_of.keys():
        raise broken(path, "lacks a single byte, so some text could not be encoded")
    pieces = [b""] * (1 + max(vocabulary.values()))
    for token, token_id in vocabulary.items():
        if token in special_tokens:
            continue
        if not byte_of.keys() >= set(token):
            raise broken(path, f"token {token_id} is not written in the byte-level alphabet")
        pieces[token_id] = bytes(byte_of[character] for character in token)
    return pieces


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's alphabet: a printable Latin-1 byte is itself, the rest follow from U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _probe(path: Path, tokenizer: Tokenizer) -> None:
    with raised_instead_of_a_panic(broken(path, "cannot encode ordinary text")):
        probed = b"".join(map(tokenizer.token_bytes, tokenizer.encode(PROBE)))
        forged = [name for name in tokenizer.special_tokens if tokenizer.special_tokens[name] in tokenizer.encode(name)]
    if probed != PROBE.encode():
        raise broken(path, "changes text: what it encodes is not what it was given")
    if forged:
        raise broken(path, f"lets a user's text become the special token {forged[0]!r}")
