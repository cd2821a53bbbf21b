"""Learns from steps taken how long decoding takes and what a prompt token adds; plain numbers, reads no clock."""

import math
from dataclasses import dataclass

SMOOTHING = 0.2  # weight of the newest step
PROBE_WEIGHT = 0.5
LEAST_RISES = 0.05
MANY_TOKENS = 64
WARM_AFTER = 8  # steps
PROBE_EVERY = 16  # full depths of steps with prompt tokens; then one without shows what decoding takes by now


@dataclass(slots=True)
class StepTimes:
    """Smoothed seconds of a step without prompt tokens, and of one prompt token. None = not measured yet.

    Where up to `depth` steps are in flight, a step is what it waits for too: all that was in flight when it began.
    """

    decode_s: float | None = None
    prompt_token_s: float | None = None
    depth: int = 1
    num_mixed: int = 0  # since the last step without prompt tokens
    num_steps: int = 0
    least_decode_s: float | None = None  # falls with one quick step and rises slowly: what it takes at least
    least_prompt_token_s: float | None = None

    def note(self, *, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from one step."""
        self.num_steps += 1
        if num_prompt_tokens == 0:
            self.least_decode_s = _least(self.least_decode_s, seconds)
        elif num_prompt_tokens >= MANY_TOKENS:  # of few tokens it would be the cost of the step
            self.least_prompt_token_s = _least(self.least_prompt_token_s, seconds / num_prompt_tokens)
        if num_prompt_tokens == 0:
            self.decode_s = _smoothed(self.decode_s, seconds, PROBE_WEIGHT if self.num_mixed else SMOOTHING)
            self.num_mixed = 0
        elif num_decodes == 0:
            self.prompt_token_s = _smoothed(self.prompt_token_s, seconds / num_prompt_tokens)
        elif self.decode_s is not None:
            self.num_mixed += 1
            # A machine that has become faster makes mixed steps shorter than decoding was: then that is what to learn.
            self.decode_s = min(self.decode_s, _smoothed(self.decode_s, seconds))
            token_s = (seconds - self.decode_s) / num_prompt_tokens
            self.prompt_token_s = _smoothed(self.prompt_token_s, max(token_s, (self.prompt_token_s or 0.0) / 2))

    def prompt_tokens_beside_decodes(self, slowdown: float, *, at_least: int) -> int | None:
        """Return how many prompt tokens make a decode step `slowdown` times as long; None = any, or not known.

        Now and then it is none at all, so that what decoding takes is not guessed from long ago.
        """
        if not self.decode_s or not self.prompt_token_s or slowdown == math.inf:
            return None
        if self.num_mixed >= PROBE_EVERY * self.depth:
            return 0
        return max(at_least, int((slowdown - 1.0) * self.decode_s / self.prompt_token_s))

    def seconds_for(self, *, num_prompt_tokens: int, num_decodes: int) -> float:
        """Return how long so many prompt tokens and steps take at least; what was not measured takes no time.

        The first steps do not count: kernels are compiled and weights read from disk in them.
        """
        if self.num_steps < WARM_AFTER:
            return 0.0
        return num_prompt_tokens * (self.least_prompt_token_s or 0.0) + num_decodes * (self.least_decode_s or 0.0)


def _least(old: float | None, new: float) -> float:
    return new if old is None else min(new, old + LEAST_RISES * (new - old))


def _smoothed(old: float | None, new: float, weight: float = SMOOTHING) -> float:
    return new if old is None else old + weight * (new - old)
