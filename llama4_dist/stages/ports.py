"""How the members of an attention group and their leader reach each other: three small interfaces, no transport.

The leader submits each part of a step to every member. Rows go from stage s, rank r to stage s + 1, rank r; the last
stage's ranks answer the leader. Whatever happens to a part, an output comes for it, or the port says WORKER_LOST.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from llama4_dist.errors import Llama4Error, UnavailableError
from llama4_dist.model.batch import Batch

WORKER_LOST = "WORKER_LOST"
TIMEOUT_S = 120.0  # of one wait: longer than a stage computes a part, held experts included
Place = tuple[int, int]  # step, first microbatch: which part of which step


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageOutput:
    """What a member made of a part of a step: rows [T, D], at the end logits [P, V] of its vocabulary, or an error.

    `wrong_answers` counts, by expert host, answers that this member and those before it proved wrong since the last.
    """

    step: int
    microbatch: int
    rows: Tensor | Llama4Error
    wrong_answers: Mapping[str, int] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        return self.step, self.microbatch


class PlanPort(Protocol):
    """The leader's way to one member."""

    def submit(self, part: Batch) -> None:
        """Send a part and return at once; UnavailableError (WORKER_LOST) where the member is known to be gone."""


class Outlet(Protocol):
    """A member's way to the next one, or to the leader."""

    def put(self, output: StageOutput) -> None:
        """Send an output, in order; UnavailableError (WORKER_LOST) where nobody can take it."""


class Inlet(Protocol):
    """The other end of an outlet."""

    def take(self, timeout_s: float) -> StageOutput:
        """Return the next output; UnavailableError (WORKER_LOST) when none comes in time, or none can come any more."""


def place_of(part: Batch) -> Place:
    """Return the name of a part."""
    return part.step, part.first_microbatch


def take_output(inlet: Inlet, part: Batch, timeout_s: float) -> StageOutput:
    """Return the output for a part; those of earlier ones, which nobody waited for, are dropped."""
    until_s = time.monotonic() + timeout_s
    while True:
        output = inlet.take(max(0.0, until_s - time.monotonic()))
        if output.place == place_of(part):
            return output
        if output.place > place_of(part):
            raise worker_lost(f"the output for part {place_of(part)} was lost: {output.place} came")


def worker_lost(message: str) -> UnavailableError:
    """Return the error of a group that has to be formed anew."""
    return UnavailableError(message, reason=WORKER_LOST, retry_after_s=1.0)


def is_lost(error: object) -> bool:
    """Tell whether an error means that a group has lost keys and values."""
    return isinstance(error, UnavailableError) and error.reason == WORKER_LOST
