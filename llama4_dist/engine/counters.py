"""What an engine counts about itself; plain additions on the engine's thread, read from any."""

from dataclasses import dataclass, field

from llama4_dist.request import FinishReason
from llama4_dist.stations import Stations


@dataclass(slots=True)
class Counters:
    """Totals since the engine was built; every accepted request enters `admitted` once and one of the ends once."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    admitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    holds: int = 0  # times that steps had to wait for an expert that no host served
    held_s: float = 0.0  # and for how long, those that ended
    stations: Stations = field(default_factory=Stations)

    def next_step(self) -> int:
        """Return the number of the step that begins now, from 1."""
        self.steps += 1
        return self.steps

    def count_end(self, finish: FinishReason | None) -> None:
        """Count the end of a request; no finish reason means it failed."""
        if finish is None:
            self.failed += 1
        elif finish is FinishReason.CANCELLED:
            self.cancelled += 1
        else:
            self.finished += 1
