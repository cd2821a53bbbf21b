"""What a member does with its time: sums for metrics, a span for each part of a step that is traced. Computes nothing.

A span's parent is the leader's step. A part that is not traced costs three looks at a clock.
"""

import time

from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.dispatch.traffic_mark import TrafficMark
from llama4_dist.errors import Llama4Error
from llama4_dist.model.batch import Batch
from llama4_dist.stages.ports import StageOutput
from llama4_dist.telemetry.tracing import NO_ATTRIBUTES, Attributes, active, ours


class PartRecord:
    """One member's, from formation to formation. One thread writes; others read single numbers.

    `busy_s` counts from when the rows of the stage before are there until the output is on its way; `starved_s` is the
    wait for those rows. `said` is what each span says of the member.
    """

    def __init__(self, said: Attributes = NO_ATTRIBUTES) -> None:
        self.num_parts = 0
        self.busy_s = 0.0
        self.starved_s = 0.0
        self._said = said

    def mark(self, part: Batch, traffic: DispatchStats) -> TrafficMark | None:
        """Read the counters before a part that is to have a span; None for one that is not."""
        return TrafficMark(traffic) if part.trace and active() is not None else None

    def note(self, part: Batch, output: StageOutput, taken_s: float, began_s: float, mark: TrafficMark | None) -> None:
        """Count a part that is over; it was taken up, and its rows were there, at these moments."""
        ended_s, starved_s = time.monotonic(), began_s - taken_s
        self.num_parts += 1
        self.starved_s += starved_s
        self.busy_s += ended_s - began_s
        tracing = active()
        if mark is None or tracing is None:
            return
        said = ours(
            step=part.step,
            part=part.first_microbatch,
            rows=len(part.token_ids_T),
            starved_s=starved_s,
            dispatch_wait_s=mark.wait_s,
        )
        tracing.record(
            "stage.part",
            part.trace,
            (began_s, ended_s),
            {**self._said, **said},
            events=mark.events(),
            error=output.rows.reason if isinstance(output.rows, Llama4Error) else "",
        )
