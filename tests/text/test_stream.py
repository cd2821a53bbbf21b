"""Deltas join to the whole decoded text, never show a broken character, and never leak a stop string."""

import itertools
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_dist.text.meta_tokenizer import read_meta_tokenizer
from llama4_dist.text.stop_strings import StopStrings
from llama4_dist.text.stream import TextStream
from llama4_dist.text.tokenizer import Tokenizer

REAL_FILE = Path(str(files("llama_models"))) / "llama4" / "tokenizer.model"
# One id per byte; 256 is a special token.
BYTES = Tokenizer([bytes([byte]) for byte in range(256)], {"<|begin_of_text|>": 256}, lambda text: list(text.encode()))


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return read_meta_tokenizer(REAL_FILE)


def streamed(stream: TextStream, pushes: list[list[int]]) -> tuple[list[str], str | None]:
    deltas = [stream.push(token_ids) for token_ids in pushes]
    deltas.append(stream.finish())
    stops = [delta.stop_match for delta in deltas if delta.stop_match is not None]
    assert len(stops) <= 1
    return [delta.text for delta in deltas], stops[0] if stops else None


@given(token_ids=st.lists(st.integers(0, 256)), cuts=st.integers(1, 5), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_deltas_of_any_bytes_join_to_the_decoded_text(token_ids: list[int], cuts: int, skip: bool) -> None:
    pushes = [token_ids[start : start + cuts] for start in range(0, len(token_ids), cuts)]
    texts, _ = streamed(TextStream(BYTES, skip_special_tokens=skip), pushes)
    assert "".join(texts) == BYTES.decode(token_ids, skip_special_tokens=skip)


@given(token_ids=st.lists(st.integers(0, 202_047)))
@settings(max_examples=200, deadline=None)
def test_deltas_of_any_real_ids_join_to_the_decoded_text(real: Tokenizer, token_ids: list[int]) -> None:
    texts, _ = streamed(TextStream(real), [[token_id] for token_id in token_ids])
    assert "".join(texts) == real.decode(token_ids)


def test_a_character_is_shown_when_its_last_byte_came() -> None:
    stream = TextStream(BYTES)
    assert [stream.push([byte]).text for byte in "é🧠".encode()] == ["", "é", "", "", "", "🧠"]
    assert stream.finish().text == ""


def test_a_character_that_never_ends_is_one_replacement_at_the_end() -> None:
    stream = TextStream(BYTES)
    assert stream.push(list("a🧠".encode()[:-1])).text == "a"
    assert stream.finish().text == "\ufffd"
    assert stream.finish().text == ""


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The slow, obvious version: the first prefix of `text` that ends in a stop string, cut there."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@given(
    text=st.text("abé", max_size=40),
    stops=st.lists(st.text("abé", min_size=1, max_size=6), max_size=4),
    include=st.booleans(),
    cut=st.integers(1, 7),
)
@settings(max_examples=1000, deadline=None)
def test_a_stop_string_is_found_as_by_searching_the_whole_text(
    text: str, stops: list[str], include: bool, cut: int
) -> None:
    token_ids = BYTES.encode(text)
    pushes = [token_ids[start : start + cut] for start in range(0, len(token_ids), cut)]
    texts, stop = streamed(TextStream(BYTES, stop=stops, include_stop=include), pushes)
    assert ("".join(texts), stop) == reference(text, stops, include)


@given(text=st.text("ab", max_size=30), stop=st.text("ab", min_size=2, max_size=6))
@settings(max_examples=500, deadline=None)
def test_no_part_of_a_stop_string_leaks_and_nothing_else_is_held_back(text: str, stop: str) -> None:
    stream, shown = TextStream(BYTES, stop=[stop]), ""
    for end, character in enumerate(text, start=1):
        delta = stream.push(BYTES.encode(character))
        shown += delta.text
        if delta.stop_match:
            break
        begun = [size for size in range(len(stop)) if text[:end].endswith(stop[:size])]
        assert shown == text[: end - max(begun)]


def test_ids_after_the_stop_string_are_not_used() -> None:
    stream = TextStream(BYTES, stop=["END"])
    delta = stream.push(BYTES.encode("oneENDtwo"))
    assert (delta.text, delta.stop_match, delta.num_tokens) == ("one", "END", 6)
    later = stream.push(BYTES.encode("three"))
    assert (later.text, later.num_tokens, stream.finish().text) == ("", 0, "")


def test_a_stop_string_inside_one_token_cuts_its_text() -> None:
    tokenizer = Tokenizer([b"say. No", b"more"], {"<|begin_of_text|>": 2}, lambda text: [])
    delta = TextStream(tokenizer, stop=["."]).push([0, 1])
    assert (delta.text, delta.stop_match, delta.num_tokens) == ("say", ".", 1)


def test_a_stop_string_does_not_stop_before_min_tokens() -> None:
    stream = TextStream(BYTES, stop=["ab"], min_tokens=4)
    assert [stream.push([byte]).text for byte in b"abab"] == ["", "ab", "", "ab"]
    assert stream.push(BYTES.encode("ab")).stop_match == "ab"


def test_several_stops_that_end_together_give_the_longest() -> None:
    stops = StopStrings(["b", "ab", "xab"])
    assert [stops.read(character) for character in "aab"] == [None, None, "ab"]


def test_work_per_character_does_not_grow_with_the_stop_string() -> None:
    class Counted(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return str.__eq__(self, other)

        def __ne__(self, other: object) -> bool:
            Counted.compared += 1
            return str.__ne__(self, other)

        __hash__ = str.__hash__

    stops = StopStrings(["a" * 200 + "b"])
    text = ("a" * 199 + "c") * 20
    for character in itertools.chain(text):
        stops.read(Counted(character))
    assert Counted.compared <= 3 * len(text)  # comparing every prefix anew would take 100 times as many
