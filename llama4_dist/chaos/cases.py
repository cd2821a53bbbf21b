"""The requests of a chaos run, and what they have to be answered: the tokens of one process without faults."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama4_dist.chaos.history import changed_fields, reference_key
from llama4_dist.chaos.history.reference import Reference
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.llm.api import LLM
from llama4_dist.request import Sampling
from llama4_dist.text.tokenizer import load_tokenizer

PROMPTS = (
    "In the beginning God created",
    "Call me Ishmael. Some years ago",
    "The whale rose slowly out of the sea, and the captain",
    "Gentlemen of the Senate and House of Representatives, the state of the Union",
    "It was the best of times",
    "The sea",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A prompt as tokens, and how to go on."""

    prompt: tuple[int, ...]
    sampling: Sampling


def make_cases(encode_ids: Sequence[Sequence[int]], *, max_tokens: int) -> tuple[Case, ...]:
    """Make greedy and seeded requests of each prompt."""
    greedy = Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    drawn = Sampling(temperature=0.8, top_p=0.95, seed=4, max_tokens=max_tokens, ignore_eos=True)
    return tuple(Case(prompt=tuple(ids), sampling=sampling) for ids in encode_ids for sampling in (greedy, drawn))


def answers_of(model: Path, cases: Sequence[Case], *, dtype: str, num_ranks: int = 1) -> Reference:
    """Compute what each case has to be answered, in this process, without experts elsewhere.

    The number of ranks is part of the arithmetic; that of stages changes no bit.
    """
    tokens: dict[str, tuple[tuple[int, ...], ...]] = {}
    with LLM(model, dtype=dtype, num_ranks=num_ranks) as llm:
        for sampling in {id(case.sampling): case.sampling for case in cases}.values():
            alike = [case.prompt for case in cases if case.sampling is sampling]
            for prompt, completion in zip(alike, llm.generate(alike, sampling), strict=True):
                tokens[reference_key(prompt, changed_fields(sampling))] = (completion.token_ids,)
    return Reference(tokens=tokens)


def prompts_of(model: Path) -> list[tuple[int, ...]]:
    """Encode the prompts; a checkpoint without a tokenizer gets made-up tokens."""
    tokenizer = load_tokenizer(model)
    if tokenizer is not None:
        return [(tokenizer.bos_token_id, *tokenizer.encode(text)) for text in PROMPTS]
    checkpoint = Checkpoint.open(model)
    vocab_size = checkpoint.config.vocab_size
    checkpoint.close()
    return [tuple((7 * number + 3 * at) % vocab_size for at in range(6 + number)) for number in range(len(PROMPTS))]
