"""The published vocabulary in tokenizer.json gives the ids of tokenizer.model, and of transformers' own reading."""

import time
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama4_dist.text.meta_tokenizer import SPLIT_PATTERN, read_meta_tokenizer
from llama4_dist.text.special_tokens import META_SPECIAL_TOKENS
from llama4_dist.text.tokenizer import Tokenizer, load_tokenizer

REAL_FILE = Path(str(files("llama_models"))) / "llama4" / "tokenizer.model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json as the published one was made: converted from tokenizer.model by transformers."""
    converter = TikTokenConverter(
        vocab_file=str(REAL_FILE), pattern=SPLIT_PATTERN, extra_special_tokens=list(META_SPECIAL_TOKENS)
    )
    folder = tmp_path_factory.mktemp("converted")
    converter.converted().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def from_json(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def from_model() -> Tokenizer:
    return read_meta_tokenizer(REAL_FILE)


def test_both_files_hold_one_vocabulary(from_json: Tokenizer, from_model: Tokenizer) -> None:
    assert from_json.vocab_size == from_model.vocab_size == 202048
    assert from_json.special_tokens == from_model.special_tokens
    assert all(from_json.token_bytes(i) == from_model.token_bytes(i) for i in range(202048))


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=300, deadline=None)
def test_both_files_give_the_same_ids(from_json: Tokenizer, from_model: Tokenizer, text: str) -> None:
    assert from_json.encode(text) == from_model.encode(text)


def test_ids_equal_transformers_where_no_special_token_is_meant(folder: Path, from_json: Tokenizer) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in ("Hello, world 123!", " 漢字 🧠\r\n\n", "don't", "a" * 30_000, " " * 30_000):
        assert from_json.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert theirs.encode("<|eot|>", add_special_tokens=False) == [200008]  # what a server must not do
    assert 200008 not in from_json.encode("<|eot|>")


@pytest.mark.parametrize("unit", ["a", " ", "\u200d", "\x00", "\n ", "\u202e\u05d0"])
def test_a_megabyte_of_one_unit_is_encoded_in_bounded_time(from_json: Tokenizer, unit: str) -> None:
    text = unit * (1_000_000 // len(unit.encode()))
    start_s = time.process_time()
    token_ids = from_json.encode(text)
    assert time.process_time() - start_s < 10.0
    assert from_json.decode(token_ids) == text
