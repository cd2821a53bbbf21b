"""What the comparisons run, how the rounds of several contenders become one figure, and how far their tokens agree."""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PROMPT_TOKENS = 32  # before a decode; short, so that weights and not the cache are what is read


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One prompt of `prompt_tokens` (num_tokens = 1), or `batch` prompts continued by `num_tokens` each."""

    name: str
    batch: int
    prompt_tokens: int
    num_tokens: int

    def prompts(self, seed: int, vocab_size: int) -> list[list[int]]:
        """Return prompts of random tokens; another seed gives others, so that no cache of prefixes can serve them."""
        generator = random.Random(f"{self.name}/{seed}")
        return [[generator.randrange(vocab_size) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]


def prefill(prompt_tokens: int) -> Workload:
    return Workload(name=f"prefill {prompt_tokens}", batch=1, prompt_tokens=prompt_tokens, num_tokens=1)


def decode(batch: int, num_tokens: int) -> Workload:
    return Workload(name=f"decode {batch}", batch=batch, prompt_tokens=PROMPT_TOKENS, num_tokens=num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The rounds of one contender at one workload, in tokens per second."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def __str__(self) -> str:
        return f"{self.median:,.1f} ({min(self.rounds):,.0f}–{max(self.rounds):,.0f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far another contender's greedy tokens are ours: of `num_sequences` the first tokens, then all up to the first
    difference. After one difference two sequences have nothing in common any more."""

    num_sequences: int
    num_first_equal: int
    num_tokens: int
    num_equal: int

    @property
    def first_share(self) -> float:
        return self.num_first_equal / self.num_sequences

    def __str__(self) -> str:
        return f"{self.num_first_equal}/{self.num_sequences} first, {self.num_equal}/{self.num_tokens} in a row"


def agreement(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Agreement:
    """Compare pairs of continuations."""
    equal = [equal_in_a_row(*pair) for pair in pairs]
    return Agreement(
        num_sequences=len(pairs),
        num_first_equal=sum(count > 0 for count in equal),
        num_tokens=sum(len(ours) for ours, _ in pairs),
        num_equal=sum(equal),
    )


def equal_in_a_row(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Return how many tokens are equal before the first difference."""
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            return index
    return len(ours)


def ratios(speeds: Mapping[str, Mapping[str, Speed]], ours: str) -> dict[str, dict[str, float]]:
    """Return, for each other contender and workload, how many times its speed ours is."""
    return {
        name: {workload: speeds[ours][workload].median / speed.median for workload, speed in of_other.items()}
        for name, of_other in speeds.items()
        if name != ours
    }
