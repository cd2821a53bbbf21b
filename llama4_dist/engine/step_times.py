"""Learns from steps taken how long decoding takes and what a prompt token adds; plain numbers, reads no clock."""

import math
from dataclasses import dataclass

SMOOTHING = 0.1  # weight of the newest step


@dataclass(slots=True)
class StepTimes:
    """Smoothed seconds of a step without prompt tokens, and of one prompt token. None = not measured yet."""

    decode_s: float | None = None
    prompt_token_s: float | None = None

    def note(self, *, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from one step."""
        if num_prompt_tokens == 0:
            self.decode_s = _smoothed(self.decode_s, seconds)
        elif num_decodes == 0:
            self.prompt_token_s = _smoothed(self.prompt_token_s, seconds / num_prompt_tokens)
        elif self.decode_s is not None:
            rest_s = max(0.0, seconds - self.decode_s)
            self.prompt_token_s = _smoothed(self.prompt_token_s, rest_s / num_prompt_tokens)

    def prompt_tokens_beside_decodes(self, slowdown: float, *, at_least: int) -> int | None:
        """Return how many prompt tokens make a decode step `slowdown` times as long; None = any, or not known."""
        if not self.decode_s or not self.prompt_token_s or slowdown == math.inf:
            return None
        return max(at_least, int((slowdown - 1.0) * self.decode_s / self.prompt_token_s))

    def seconds_for(self, *, num_prompt_tokens: int, num_decodes: int) -> float:
        """Return how long so many prompt tokens and steps take at least; what was never measured takes no time."""
        return num_prompt_tokens * (self.prompt_token_s or 0.0) + num_decodes * (self.decode_s or 0.0)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
