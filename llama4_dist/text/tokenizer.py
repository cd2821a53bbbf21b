"""Text ⇄ token ids of one vocabulary, and finding the tokenizer of a checkpoint; knows no chat format.

The file formats are read by `hf_tokenizer` (tokenizer.json) and `meta_tokenizer` (tokenizer.model). Both give the same
class: a list of pieces, the names of the special tokens, and the library's function for plain text.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llama4_dist.errors import CheckpointError, FieldViolation, InvalidRequestError, UnsupportedError
from llama4_dist.text.panics import raised_instead_of_a_panic

BOS = "<|begin_of_text|>"
HF_FILE = "tokenizer.json"
META_FILE = "tokenizer.model"


class Tokenizer:
    """One vocabulary: `pieces[id]` are a plain token's raw bytes, `special_tokens` the ids of the control tokens."""

    def __init__(
        self,
        pieces: Sequence[bytes],
        special_tokens: Mapping[str, int],
        encode: Callable[[str], list[int]],
        *,
        file: str = "",
    ) -> None:
        self.file = file  # name of the file it was read from
        self.special_tokens = dict(special_tokens)
        self.vocab_size = max(len(pieces), 1 + max(self.special_tokens.values(), default=-1))
        self.bos_token_id = self.special_token_id(BOS)
        self._pieces = pieces
        self._names = {token_id: name for name, token_id in self.special_tokens.items()}
        self._encode = encode

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` as plain text: no BOS, and what looks like a special token stays text.

        Raises InvalidRequestError for lone surrogates, which no byte sequence stands for.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _refused(f"holds a lone surrogate at character {error.start}, which is no valid Unicode") from None
        with raised_instead_of_a_panic(_refused("the tokenizer cannot encode it")):
            return self._encode(text)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        pieces = (self.shown_bytes(token_id, skip_special_tokens) for token_id in token_ids)
        return b"".join(pieces).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the raw bytes of one token: b"" for a special token and for an id the vocabulary does not use.

        A model's output layer may be wider than its vocabulary, so an unused id can be drawn and is no error here.
        """
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

    def shown_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
        """Return the bytes a reader sees: the raw bytes, or a special token's name unless those are skipped."""
        name = None if skip_special_tokens else self._names.get(token_id)
        return self.token_bytes(token_id) if name is None else name.encode()

    def special_token_id(self, name: str) -> int:
        """Return the id of a special token such as "<|eot|>"; UnsupportedError if this vocabulary lacks it."""
        if name not in self.special_tokens:
            raise UnsupportedError(f"the tokenizer has no {name!r}: this checkpoint was not trained with it")
        return self.special_tokens[name]


def load_tokenizer(model_dir: Path) -> Tokenizer | None:
    """Read tokenizer.json, else Meta's tokenizer.model, of a checkpoint folder; None if it has neither.

    Raises CheckpointError naming the file if it is damaged, hostile or no Llama 4 tokenizer.
    """
    # Imported late: a process needs one of the two libraries, and one that gets token ids needs neither.
    if (model_dir / HF_FILE).exists():
        from llama4_dist.text.hf_tokenizer import read_hf_tokenizer

        return read_hf_tokenizer(model_dir / HF_FILE)
    if (model_dir / META_FILE).exists():
        from llama4_dist.text.meta_tokenizer import read_meta_tokenizer

        return read_meta_tokenizer(model_dir / META_FILE)
    return None


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise CheckpointError if the tokenizer can name ids that the model's embedding does not hold."""
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{tokenizer.file}: has ids up to {tokenizer.vocab_size - 1}, the model's vocabulary ends at "
            f"{vocab_size - 1}: the file belongs to another checkpoint",
            file=tokenizer.file,
        )


def _refused(problem: str) -> InvalidRequestError:
    return InvalidRequestError([FieldViolation(field="text", description=problem)])
