"""`llama4-dist tokenize`: the tokens of a text, each with its own text."""

import sys
from pathlib import Path

from llama4_dist.cli.backend import Place, chosen, open_remote
from llama4_dist.cli.output import console, print_json, reporting
from llama4_dist.errors import ConfigError


def run_tokenize(text: str | None, place: Place) -> None:
    """Tokenize with a folder's tokenizer or a server's; no weights are loaded."""
    with reporting(place.as_json):
        where = chosen(place)
        source = sys.stdin.read() if text in (None, "-") else str(text)
        token_ids, pieces = _by_folder(where, source) if isinstance(where, Path) else _by_server(place, where, source)
    if place.as_json:
        print_json({"token_ids": token_ids, "tokens": pieces})
        return
    for token_id, piece in zip(token_ids, pieces, strict=True):
        console.print(f"{token_id:>8}  ", end="", highlight=False)
        console.print(repr(piece), markup=False, highlight=False)
    console.print(f"[dim]{len(token_ids)} tokens[/]")


def _by_server(place: Place, server: str, source: str) -> tuple[list[int], list[str]]:
    with open_remote(place, server) as client:
        token_ids = list(client.tokenize(source, add_special_tokens=False))
        return token_ids, [client.detokenize([token_id], skip_special_tokens=False) for token_id in token_ids]


def _by_folder(model: Path, source: str) -> tuple[list[int], list[str]]:
    from llama4_dist.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise ConfigError(f"{model} holds no tokenizer.json and no tokenizer.model")
    token_ids = tokenizer.encode(source)
    return token_ids, [tokenizer.token_bytes(token_id).decode("utf-8", "replace") for token_id in token_ids]
