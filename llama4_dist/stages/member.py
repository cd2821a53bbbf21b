"""One member of an attention group: a range of layers, a rank's share of them, their keys and values, their experts.

It knows its neighbours as ports only, and no sequences: what the leader plans it computes.
"""

import logging
import time
from collections import Counter
from typing import Protocol

from torch import Tensor

from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.errors import EngineError, Llama4Error, UnavailableError
from llama4_dist.model.batch import Batch
from llama4_dist.model.dispatcher import Dispatcher
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.reduction import Ranks, Reduction
from llama4_dist.stages.part_record import PartRecord
from llama4_dist.stages.ports import TIMEOUT_S, Inlet, Outlet, StageOutput, take_output, worker_lost

log = logging.getLogger(__name__)


class StageModel(Protocol):
    """A decoder with some of the layers; `CpuLlama4` and `Llama4` are ones."""

    reduction: Reduction | None

    def forward(
        self, batch: Batch, cache: KVCache, dispatcher: Dispatcher, rows_TD: Tensor | None = None
    ) -> Tensor: ...


class CountingDispatcher(Dispatcher, Protocol):
    """A dispatcher that says which hosts it proved wrong."""

    def stats(self) -> DispatchStats: ...


class StageRunner:
    """The arithmetic of a member, part by part. Not thread-safe: one thread calls it, and holds no lock meanwhile.

    A part of a step that has failed here is not computed: its keys would have gaps before them. An error that the ranks
    raised together leaves them in step; after any other this one leaves its group, and all that comes is WORKER_LOST
    until it is to `rejoin`.
    """

    def __init__(self, model: StageModel, cache: KVCache, dispatcher: CountingDispatcher) -> None:
        self.dispatcher = dispatcher
        self._model = model
        self._cache = cache
        self._failed: tuple[int, Llama4Error] | None = None  # the last step that failed here, and why
        self.lost: UnavailableError | None = None  # since it left its ranks
        self._told: Counter[str] = Counter()

    def run(self, part: Batch, before: StageOutput | None) -> StageOutput:
        """Compute a part on the output of the stage before (None in the first); an error becomes the output."""
        wrong_answers = Counter({} if before is None else before.wrong_answers)
        rows: Tensor | Llama4Error
        try:
            rows = self.lost or self._compute(part, before)
        except Exception as error:  # noqa: BLE001 - logged, and told to all who would wait for this part
            rows = self._after(error, part)
        return StageOutput(
            step=part.step,
            microbatch=part.first_microbatch,
            rows=rows,
            wrong_answers=wrong_answers + self._newly_wrong(),
        )

    def leave(self) -> None:
        """Leave the ranks, so that one that gathers does not wait; all that comes is WORKER_LOST until `rejoin`.

        To be called by the thread that calls `run`.
        """
        if self._model.reduction is not None:
            self._model.reduction.ranks.abort()
        self.lost = self.lost or worker_lost("this member has left its group")

    def rejoin(self, ranks: Ranks | None) -> None:
        """Be a member of a group that was formed anew, with the weights read before; what the cache holds is void.

        To be called by the thread that calls `run`: a part of the old group must not meet the new ranks.
        """
        reduction = self._model.reduction
        if (reduction is None) != (ranks is None):
            raise ValueError(f"{ranks=} does not fit: a stage that had one rank has one, and takes None")
        if reduction is not None and ranks is not None:
            reduction.ranks = ranks
        self.lost = self._failed = None

    def _compute(self, part: Batch, before: StageOutput | None) -> Tensor:
        failure = self._failure(part, before)
        if self._model.reduction is not None:
            self._model.reduction.agree(failure)
        elif failure is not None:
            raise failure
        rows_TD = None if before is None or isinstance(before.rows, Llama4Error) else before.rows
        return self._model.forward(part, self._cache, self.dispatcher, rows_TD)

    def _failure(self, part: Batch, before: StageOutput | None) -> Llama4Error | None:
        if before is not None and isinstance(before.rows, Llama4Error):
            return before.rows
        return self._failed[1] if self._failed is not None and self._failed[0] == part.step else None

    def _after(self, error: Exception, part: Batch) -> Llama4Error:
        """Put the member in order after a part that failed; return what the others are told."""
        self.dispatcher.begin_step(part.step)  # forgets the rows that a broken pass left in flight
        reduction = self._model.reduction
        if not isinstance(error, Llama4Error):
            log.error("stage_failed step=%d", part.step, exc_info=error)
        told = error if isinstance(error, Llama4Error) else EngineError(f"a stage failed: {type(error).__name__}")
        if reduction is not None and reduction.agreed is not error:
            log.error("stage_left_its_ranks step=%d cause=%s", part.step, error)
            reduction.ranks.abort()
            self.lost = told = worker_lost(f"a rank of a stage was lost in a step: {type(error).__name__}")
        self._failed = (part.step, told)
        return told

    def _newly_wrong(self) -> Counter[str]:
        proved = self.dispatcher.stats().wrong_answers
        new = proved - self._told
        self._told = Counter(proved)
        return new


class StageMember:
    """A runner between its neighbours: takes rows from the one before, gives what it makes of them to the one after."""

    def __init__(
        self,
        runner: StageRunner,
        *,
        before: Inlet | None,
        after: Outlet,
        record: PartRecord | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`before` is None in the first stage; in the last, `after` leads to the leader."""
        self.runner = runner
        self._before = before
        self._after = after
        self._record = record or PartRecord()
        self._timeout_s = timeout_s

    def compute(self, part: Batch) -> None:
        """Carry out a part as the leader planned it. Raises WORKER_LOST where its output can go nowhere."""
        taken_s = time.monotonic()
        before = self._rows_before(part)
        began_s = time.monotonic()
        mark = self._record.mark(part, self.runner.dispatcher.stats())
        output = self.runner.run(part, before)
        try:
            self._after.put(output)
        finally:
            self._record.note(part, output, taken_s, began_s, mark)

    def _rows_before(self, part: Batch) -> StageOutput | None:
        if self._before is None:
            return None
        try:
            return take_output(self._before, part, self._timeout_s)
        except Llama4Error as error:  # the other ranks, and who comes after, must not wait for this part
            return StageOutput(step=part.step, microbatch=part.first_microbatch, rows=error)
