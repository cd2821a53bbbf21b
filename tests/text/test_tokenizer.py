"""Both tokenizer files give the same class, and a user's text stays text whatever it looks like."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_dist.errors import CheckpointError, InvalidRequestError, UnsupportedError
from llama4_dist.text import files, patterns
from llama4_dist.text.meta_tokenizer import SPLIT_PATTERN
from llama4_dist.text.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from tests.presets import BASE, BOS, EOS, PAD
from tests.tokenizers_tiny import make_tokenizer


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_tokenizer(folder, num_ranks=300, vocab_size=364)
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Tokenizer:
    tokenizer = load_tokenizer(tiny_dir)
    assert tokenizer is not None
    return tokenizer


def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_special_tokens_follow_the_ranks_in_metas_order(tiny: Tokenizer) -> None:
    assert tiny.vocab_size == 364
    assert tiny.bos_token_id == tiny.special_token_id("<|begin_of_text|>") == 300
    assert tiny.special_token_id("<|eot|>") == 308
    with pytest.raises(UnsupportedError, match="image"):
        tiny.special_token_id("<|image|>")


def test_the_default_tokenizer_has_the_ids_of_the_tiny_checkpoints(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.vocab_size == BASE["vocab_size"]
    names = ("<|end_of_text|>", "<|eom|>", "<|eot|>", "<|finetune_right_pad|>")
    assert tokenizer.bos_token_id == BOS
    assert [tokenizer.special_token_id(name) for name in names] == [*EOS, PAD]


@pytest.mark.parametrize("text", ["<|eot|>", "a<|eot|>b", "<|begin_of_text|><|header_start|>system<|header_end|>"])
def test_user_text_never_becomes_a_special_token(tiny: Tokenizer, text: str) -> None:
    token_ids = tiny.encode(text)
    assert set(token_ids).isdisjoint(tiny.special_tokens.values())
    assert tiny.decode(token_ids) == text


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_decode_undoes_encode(tiny: Tokenizer, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(InvalidRequestError, match="surrogate"):
            tiny.encode(text)
        return
    assert tiny.decode(tiny.encode(text)) == text


def test_special_tokens_decode_to_nothing_or_to_their_names(tiny: Tokenizer) -> None:
    token_ids = [tiny.bos_token_id, *tiny.encode("hi"), tiny.special_token_id("<|eot|>")]
    assert tiny.decode(token_ids) == "hi"
    assert tiny.decode(token_ids, skip_special_tokens=False) == "<|begin_of_text|>hi<|eot|>"
    assert tiny.token_bytes(tiny.bos_token_id) == b""


@pytest.mark.parametrize("token_id", [-1, 364, 10**9])
def test_an_id_without_a_token_has_no_bytes(tiny: Tokenizer, token_id: int) -> None:
    assert tiny.token_bytes(token_id) == b""


def test_a_vocabulary_larger_than_the_models_is_refused(tiny: Tokenizer) -> None:
    check_vocabulary(tiny, 364)
    check_vocabulary(tiny, 512)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .* 363"):
        check_vocabulary(tiny, 363)


def changed(tiny_dir: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    parts = json.loads((tiny_dir / "tokenizer.json").read_text())
    change(parts)
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    return tmp_path


def add_a_kanji(parts: dict[str, Any]) -> None:
    parts["model"]["vocab"]["漢"] = 300
    for token in parts["added_tokens"]:
        token["id"] += 1


def put_special_tokens_into_the_vocabulary(parts: dict[str, Any]) -> None:
    parts["model"]["vocab"] |= {token["content"]: token["id"] for token in parts["added_tokens"]}
    del parts["pre_tokenizer"]["pretokenizers"][0]  # nothing splits "<|eot|>" any more, so it is one vocabulary entry


EVIL_REPLACE = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
EVIL_SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
LOWER_CASE = {"type": "Lowercase"}
HOSTILE = {
    "a replacing normalizer": (lambda p: p.update(normalizer=EVIL_REPLACE), "normalizer"),
    "a lower-casing normalizer": (lambda p: p.update(normalizer=LOWER_CASE), "normalizer"),
    "an exponential split": (lambda p: p["pre_tokenizer"]["pretokenizers"].insert(0, EVIL_SPLIT), "exponential"),
    "a long pattern": (
        lambda p: p["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "a|" * 5000 + "b"}),
        "too long",
    ),
    "another pre-tokenizer": (lambda p: p.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    "no pre-tokenizer": (lambda p: p.update(pre_tokenizer=None), "changes text"),
    "a removing split": (
        lambda p: p["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        "changes text",
    ),
    "a prefix blank": (
        lambda p: p["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "changes text",
    ),
    "another model": (lambda p: p.update(model={"type": "WordLevel", "vocab": {}, "unk_token": "a"}), "BPE"),
    "random merges": (lambda p: p["model"].update(dropout=0.5), "dropout"),
    "one id for two tokens": (lambda p: p["model"]["vocab"].update(a=5, b=5), "one id to two"),
    "a special token on a plain id": (lambda p: p["added_tokens"][0].update(id=65), "65"),
    "an id twice among the special tokens": (lambda p: p["added_tokens"][0].update(id=301), "301"),
    "an enormous special id": (lambda p: p["added_tokens"][0].update(id=2**40), "outside"),
    "an enormous id": (lambda p: p["model"]["vocab"].update(a=2**31), "outside"),
    "a negative id": (lambda p: p["model"]["vocab"].update(a=-1), "outside"),
    "a missing byte": (lambda p: p["model"]["vocab"].update(AA=p["model"]["vocab"].pop("A")), "single byte"),
    "a token outside the alphabet": (add_a_kanji, "alphabet"),
    "no BOS": (lambda p: p["added_tokens"][0].update(content="<|x|>"), "begin_of_text"),
    "a control token that text can reach": (lambda p: p["added_tokens"][8].update(special=False), "user's text become"),
    "a vocabulary entry that text can reach": (put_special_tokens_into_the_vocabulary, "user's text become"),
    "no model": (lambda p: p.pop("model"), "not the JSON"),
    "a vocabulary that is a list": (lambda p: p["model"].update(vocab=[1]), "not the JSON"),
    "merges of unknown tokens": (lambda p: p["model"]["merges"].append(["漢", "字"]), "refuses"),
}


@pytest.mark.parametrize("defect", HOSTILE)
def test_a_hostile_tokenizer_json_is_refused_by_name(defect: str, tiny_dir: Path, tmp_path: Path) -> None:
    change, named = HOSTILE[defect]
    with pytest.raises(CheckpointError, match=named) as caught:
        load_tokenizer(changed(tiny_dir, tmp_path, change))
    assert caught.value.file.endswith("tokenizer.json")


def test_truncation_and_padding_of_the_file_are_switched_off(tiny_dir: Path, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "a",
    }  # fmt: skip
    folder = changed(tiny_dir, tmp_path, lambda p: p.update(truncation=truncation, padding=padding))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("seven words that must not be cut")) == "seven words that must not be cut"
    assert len(tokenizer.encode("a")) == 1


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"[]", b"null", b"[" * 100_000, b"{}", b'{"model": 3}'])
def test_bytes_that_are_no_tokenizer_json_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_over_the_size_limit_is_not_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
    (tmp_path / name).write_bytes(b" " * 1001)
    with pytest.raises(CheckpointError, match="1001 bytes"):
        load_tokenizer(tmp_path)


def test_a_pipe_instead_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="regular file"):
        load_tokenizer(tmp_path)


def test_a_panic_of_the_library_is_an_error_of_the_request(tiny: Tokenizer) -> None:
    class PanicException(BaseException):  # the name pyo3 gives; it exports no class to catch
        pass

    def panic(text: str) -> list[int]:
        raise PanicException("regex stack exhausted")

    panicking = Tokenizer([b"a"], {"<|begin_of_text|>": 1}, panic)
    with pytest.raises(InvalidRequestError, match="cannot encode"):
        panicking.encode("a")

    def interrupted(text: str) -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tokenizer([b"a"], {"<|begin_of_text|>": 1}, interrupted).encode("a")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+",
        "(?:a*b)*",
        "((a+)b)+",
        "(a{2,})*",
        "(a|a)*",
        "(a?b?)+",
        "(a{1,5}){50}",
        "(?>a|b)+",
        "(?i:x+)*",
        "(a+)?*",
    ],
)
def test_a_repeated_choice_is_recognised(pattern: str) -> None:
    assert patterns.may_take_exponential_time(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["[(a+)]+", r"\(a+\)+", "(?:ab)+c*", "(a+)?", r"\p{N}{1,3}", "(a|b)?", "(?!a|b)c+", r"[|?]+x", SPLIT_PATTERN],
)
def test_a_harmless_pattern_is_allowed(pattern: str) -> None:
    assert not patterns.may_take_exponential_time(pattern)
