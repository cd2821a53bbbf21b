"""`llama4-dist tokenize`: the tokens of a text, each with its own text."""

import sys
from typing import Any

from llama4_dist.cli.backend import Backend, open_client
from llama4_dist.cli.output import console, print_json, reporting
from llama4_dist.errors import ConfigError


def run_tokenize(backend: Backend, flags: dict[str, Any]) -> None:
    """Tokenize `flags["text"]` with a folder's tokenizer or a server's; no weights are loaded."""
    with reporting(backend.as_json):
        text = flags["text"]
        source = sys.stdin.read() if text in (None, "-") else str(text)
        token_ids, pieces = _by_server(backend, source) if backend.server else _by_folder(backend, source)
    if backend.as_json:
        print_json({"token_ids": token_ids, "tokens": pieces})
        return
    for token_id, piece in zip(token_ids, pieces, strict=True):
        console.print(f"{token_id:>8}  ", end="", highlight=False)
        console.print(repr(piece), markup=False, highlight=False)
    console.print(f"[dim]{len(token_ids)} tokens[/]")


def _by_server(backend: Backend, source: str) -> tuple[list[int], list[str]]:
    with open_client(backend) as client:
        token_ids = list(client.tokenize(source, add_special_tokens=False))
        return token_ids, [client.detokenize([token_id], skip_special_tokens=False) for token_id in token_ids]


def _by_folder(backend: Backend, source: str) -> tuple[list[int], list[str]]:
    from llama4_dist.text.tokenizer import load_tokenizer

    if backend.model is None:
        raise ConfigError("give either --model DIR or --server HOST:PORT")
    tokenizer = load_tokenizer(backend.model)
    if tokenizer is None:
        raise ConfigError(f"{backend.model} holds no tokenizer.json and no tokenizer.model")
    token_ids = tokenizer.encode(source)
    return token_ids, [tokenizer.token_bytes(token_id).decode("utf-8", "replace") for token_id in token_ids]
