"""Meta's tokenizer.model gives the ids of Meta's own code; the real file is read from the llama_models package."""

import base64
import time
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer

from llama4_dist.errors import CheckpointError
from llama4_dist.text.meta_tokenizer import SPLIT_PATTERN, read_meta_tokenizer, split_long_runs
from llama4_dist.text.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizers_tiny import make_tokenizer

REAL_FILE = Path(str(files("llama_models"))) / "llama4" / "tokenizer.model"


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return read_meta_tokenizer(REAL_FILE)


@pytest.fixture(scope="module")
def metas() -> MetaTokenizer:
    return MetaTokenizer(REAL_FILE)


def test_vocabulary_and_special_tokens_are_metas(ours: Tokenizer, metas: MetaTokenizer) -> None:
    assert ours.vocab_size == metas.n_words == 202048
    assert ours.special_tokens == metas.special_tokens
    assert ours.special_token_id("<|eot|>") == 200008
    assert metas.O200K_PATTERN == SPLIT_PATTERN


TEXTS = [
    "",
    "Hello, world! It's 12345 o'clock.",
    "  two blanks\tand a tab \r\n\r\n end  ",
    "Ünïcödé 漢字かな 한국어 العربية עברית ไทย हिन्दी 🧠👩‍👩‍👧 e\u0301",
    "<|eot|><|begin_of_text|><|reserved_special_token_0|>",
    "\x00\u202e\u200d\ufeff\U0010ffff",
    "camelCaseWords HTTPServer 3.14159e-10 a_b-c/d\\e",
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_metas(ours: Tokenizer, metas: MetaTokenizer, text: str) -> None:
    token_ids = ours.encode(text)
    assert token_ids == metas.encode(text, bos=False, eos=False)
    assert ours.decode(token_ids) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=300, deadline=None)
def test_ids_equal_metas_for_any_text(ours: Tokenizer, metas: MetaTokenizer, text: str) -> None:
    assert ours.encode(text) == metas.encode(text, bos=False, eos=False)


LONG = {
    "letters": "a" * 1_000_000,
    "blanks": " " * 1_000_000,
    "joiners": "\u200d" * 300_000,
    "runs around the limit": " ".join("b" * length for length in (24_999, 25_000, 25_001, 50_000, 50_001)),
    "blanks around the limit": "c".join(" " * length for length in (25_000, 25_001, 75_001)),
    "across a chunk": "d" * 30_000 + " e" * 184_000 + "f" * 60_000,
}


@pytest.mark.parametrize("name", LONG)
def test_long_runs_are_cut_as_meta_cuts_them(name: str, ours: Tokenizer, metas: MetaTokenizer) -> None:
    start = time.process_time()
    token_ids = ours.encode(LONG[name])
    assert time.process_time() - start < 5.0  # without the cuts tiktoken panics or takes minutes
    assert token_ids == metas.encode(LONG[name], bos=False, eos=False)


def test_the_cuts_lose_nothing() -> None:
    for text in LONG.values():
        parts = list(split_long_runs(text))
        assert "".join(parts) == text
        assert max(map(len, parts)) <= 400_000


def test_tokenizer_json_comes_first_where_both_files_are(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").symlink_to(REAL_FILE)
    both = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    metas_alone = load_tokenizer(tmp_path)
    assert both is not None
    assert metas_alone is not None
    assert (both.vocab_size, metas_alone.vocab_size) == (320, 202048)


def lines(pieces: list[bytes]) -> list[bytes]:
    return [base64.b64encode(piece) + b" %d" % rank for rank, piece in enumerate(pieces)]


BYTES = [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lines(BYTES)[:-1], "single byte"),
        ([*lines(BYTES), b"YWI= 255"], "line 257"),
        ([*lines(BYTES), b"YWI= 300"], "line 257"),
        ([*lines(BYTES), b"YQ== 256"], "twice"),
        ([*lines(BYTES), b"?? 256"], "line 257"),
        ([*lines(BYTES), b"YWI="], "line 257"),
        ([*lines(BYTES), b"YWI= x"], "line 257"),
        ([*lines(BYTES), b"YWI= -1"], "line 257"),
        ([b"\xff\xfe\x00"], "line 1"),
        ([], "single byte"),
    ],
)
def test_a_damaged_tokenizer_model_is_refused_by_line(content: list[bytes], named: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(content))
    with pytest.raises(CheckpointError, match=named) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.file == str(path)


def test_special_tokens_follow_the_last_rank(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(lines([*BYTES, b"ab"])))
    tokenizer = read_meta_tokenizer(path)
    assert tokenizer.bos_token_id == 257
    assert tokenizer.vocab_size == 257 + 2048
    assert tokenizer.encode("ab") == [256]
