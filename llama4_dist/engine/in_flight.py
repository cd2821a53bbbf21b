"""What a plan knows of the steps before it that are not over, and what they leave to the next; pure numbers.

A model of P stages computes P steps at a time, each of other sequences: then every stage has a part while the leader
waits for none. What bounds one step of a whole model bounds here all that are in flight together: each takes its share.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from llama4_dist.engine.sequence import SequenceState


class HasTokens(Protocol):
    """A span of a step."""

    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InFlight:
    """At most `depth` steps; `num_steps` are under way with so many tokens, and `sequences` must not be planned.

    Of these `num_sampling` get a token, so they decode from then on.
    """

    depth: int = 1
    num_steps: int = 0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_sampling: int = 0
    sequences: Collection[SequenceState] = frozenset()

    @property
    def num_decodes(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    def share(self, number: int) -> int:
        """Return how many of so many sequences, in flight or not, a step takes, so that all are in `depth` steps."""
        return -(-number // self.depth)

    def prompt_share(self, bound: int, taken: int, num_prompts: int) -> int:
        """Return how many prompt tokens a step takes of `bound`, of which so many are taken already.

        It is shared by as many steps as there are prompts, in flight or not, so that one alone takes all of it.
        """
        num_sharers = min(self.depth, max(1, num_prompts))
        return max(0, min(bound - taken, -(-bound // num_sharers)))

    def num_parts(self, spans: Iterable[HasTokens], bound: int, num_idle: int) -> int:
        """Return in how many parts a step of `spans` goes out; `num_idle` sequences could have been planned.

        Parts are alike: a step with all tokens of `bound` is as many as the stages. Where there are fewer steps than
        stages, their parts fill them.
        """
        if self.depth == 1:
            return 1
        num_tokens = sum(span.num_tokens for span in spans)
        num_steps = min(self.depth, self.num_steps + max(1, num_idle))
        return max(-(-self.depth * num_tokens // bound), -(-self.depth // num_steps))


NOTHING_IN_FLIGHT = InFlight()
