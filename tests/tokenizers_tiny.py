"""Makes a small tokenizer.json with Llama 4's special tokens, to lie beside a tiny checkpoint."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llama4_dist.text.special_tokens import META_SPECIAL_TOKENS

PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = (
    "the user asks and the assistant answers in one sentence",
    "system user assistant ipython\n\n",
    "日本語のテキスト 🧠",
)


def make_tokenizer(folder: Path, vocab_size: int = 320, num_ranks: int = 256) -> Path:
    """Write folder/tokenizer.json with `vocab_size` ids: bytes and merges up to `num_ranks`, then special tokens.

    The special tokens stand in Meta's order, so that with the default they have the ids of `tests.presets`:
    BOS 256, end of text 257, header 261 and 262, eom 263, eot 264, pad 274.
    """
    library = Tokenizer(models.BPE(ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS, trainer)
    special_tokens = META_SPECIAL_TOKENS[: vocab_size - num_ranks]
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special_tokens])
    assert library.get_vocab_size() == vocab_size, f"TEXTS gives {library.get_vocab_size()} ids, not {vocab_size}"
    path = folder / "tokenizer.json"
    library.save(str(path))
    return path
