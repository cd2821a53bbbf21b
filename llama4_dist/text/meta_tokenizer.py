"""Reads Meta's tokenizer.model: a list of byte pairs by rank, encoded with tiktoken.

Ids equal those of Meta's own tokenizer (llama-models, models/llama4/tokenizer.py), whose special tokens, split pattern
and cutting of long runs are restated here.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from pathlib import Path

import tiktoken

from llama4_dist.text.files import broken, read_bounded
from llama4_dist.text.panics import raised_instead_of_a_panic
from llama4_dist.text.special_tokens import META_SPECIAL_TOKENS
from llama4_dist.text.tokenizer import Tokenizer

# o200k: words with their case and contraction, up to three digits, marks, line ends, blanks.
SPLIT_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# tiktoken panics or takes quadratic time beyond these (github.com/openai/tiktoken/issues/195).
MAX_CHUNK_CHARS = 400_000
MAX_RUN_CHARS = 25_000
_RUN = re.compile(r"\s+|\S+")


def read_meta_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.model; CheckpointError names the line that is wrong."""
    pieces = _pieces(path)
    special_tokens = {name: len(pieces) + place for place, name in enumerate(META_SPECIAL_TOKENS)}
    with raised_instead_of_a_panic(broken(path, "tiktoken refuses the vocabulary")):
        encoding = tiktoken.Encoding(
            name=path.name,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
            special_tokens=special_tokens,
        )

    def encode(text: str) -> list[int]:
        return [token_id for part in split_long_runs(text) for token_id in encoding.encode_ordinary(part)]

    return Tokenizer(pieces, special_tokens, encode, file=path.name)


def split_long_runs(text: str) -> Iterator[str]:
    """Cut `text` every MAX_CHUNK_CHARS, and within that every MAX_RUN_CHARS of blanks or of non-blanks on end."""
    for chunk_start in range(0, len(text), MAX_CHUNK_CHARS):
        chunk = text[chunk_start : chunk_start + MAX_CHUNK_CHARS]
        start = 0
        for run in _RUN.finditer(chunk):
            for cut in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
                yield chunk[start:cut]
                start = cut
        yield chunk[start:]


def _pieces(path: Path) -> list[bytes]:
    pieces: list[bytes] = []
    for number, line in enumerate(read_bounded(path).splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            encoded, rank = fields
            piece = base64.b64decode(encoded, validate=True)
            in_order = int(rank) == len(pieces)
        except (ValueError, binascii.Error):
            raise broken(path, f"line {number} is not 'base64 rank'") from None
        if not in_order or not piece:
            raise broken(path, f"line {number} should hold a piece of rank {len(pieces)}")
        pieces.append(piece)
    known = set(pieces)
    if len(known) != len(pieces):
        raise broken(path, "holds a piece twice")
    if not all(bytes([byte]) in known for byte in range(256)):
        raise broken(path, "lacks a single byte, so some text could not be encoded")
    return pieces
