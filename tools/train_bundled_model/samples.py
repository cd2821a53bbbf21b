"""Lays documents out as rows of token ids, plain or as a chat; knows the chat format and nothing of models."""

import random
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.train_bundled_model.corpus import Document
from tools.train_bundled_model.tokenizer import special_id

CHAT_SHARE = 0.25
SPEECH_SHARE = 0.75
IGNORED = -100  # the target of padding; cross_entropy's default ignore_index


def epoch(documents: list[Document], tokenizer: Tokenizer, length: int, seed: int) -> Tensor:
    """Return [rows, length + 1] ids: each row begins a text, each pass over the corpus cuts it elsewhere."""
    dice = random.Random(seed)
    # The speeches are half of all text; leaving some out of each pass keeps the four sources in proportion.
    chosen = [d for d in documents if d.source != "state-of-the-union" or dice.random() < SPEECH_SHARE]
    texts = [text for document in chosen for text in rows_of(document, length, dice)]
    dice.shuffle(texts)
    padding = [special_id(tokenizer, "<|finetune_right_pad|>")] * length
    encoded = tokenizer.encode_batch_fast(texts)
    return torch.tensor([(row.ids + padding)[: length + 1] for row in encoded], dtype=torch.int16)


def held_out(documents: list[Document], tokenizer: Tokenizer, length: int) -> Tensor:
    """Return the full rows of the given documents, each in plain form and cut from its beginning."""
    rows = []
    for d in documents:
        flat = [(s, i == 0) for paragraph in d.paragraphs for i, s in enumerate(paragraph)]
        ids = tokenizer.encode(joined(flat)).ids
        begin = special_id(tokenizer, "<|begin_of_text|>")
        rows += [[begin, *ids[i : i + length]] for i in range(0, len(ids) - length + 1, length)]
    return torch.tensor(rows, dtype=torch.int16)


def targets_of(ids_BT: Tensor, pad_id: int) -> Tensor:
    """Return the ids to predict, padding ignored."""
    return ids_BT.masked_fill(ids_BT == pad_id, IGNORED)


def rows_of(document: Document, length: int, dice: random.Random) -> Iterator[str]:
    """Cut one document into texts a little longer than a row, skipping a random stretch at its start."""
    characters = int(length * 4.6)  # an English token of this vocabulary holds under four characters
    flat = [(s, i == 0) for paragraph in document.paragraphs for i, s in enumerate(paragraph)]
    cursor = dice.randrange(min(6, len(flat)))
    while cursor < len(flat):
        end, size = cursor, 0
        while end < len(flat) and size < characters:
            size += len(flat[end][0])
            end += 1
        chat = dice.random() < CHAT_SHARE
        yield chat_of(flat[cursor:end], dice) if chat else plain(flat[cursor:end], ended=end == len(flat))
        cursor = end


def plain(sentences: list[tuple[str, bool]], ended: bool) -> str:
    return "<|begin_of_text|>" + joined(sentences) + ("<|end_of_text|>" if ended else "")


def chat_of(sentences: list[tuple[str, bool]], dice: random.Random) -> str:
    """Lay a passage out as turns: the user quotes one to three sentences, the assistant goes on."""
    text, cursor, is_user = "<|begin_of_text|>", 0, True
    while cursor < len(sentences):
        end = cursor + (dice.randint(1, 3) if is_user else dice.randint(2, 7))
        role = "user" if is_user else "assistant"
        text += f"<|header_start|>{role}<|header_end|>\n\n{joined(sentences[cursor:end])}<|eot|>"
        cursor, is_user = end, not is_user
    return text


def joined(sentences: list[tuple[str, bool]]) -> str:
    """Join sentences by blanks, paragraphs by an empty line."""
    return "".join(
        ("" if i == 0 else "\n\n" if starts else " ") + sentence for i, (sentence, starts) in enumerate(sentences)
    )
