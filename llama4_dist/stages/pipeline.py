"""The model as a leader sees it: steps go out in parts to all members, logits come back from the last stage."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.errors import Llama4Error, UnavailableError
from llama4_dist.model.batch import Batch
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.stages.ports import TIMEOUT_S, Inlet, PlanPort, is_lost, take_output
from llama4_dist.stages.split import split_batch
from llama4_dist.stations import NotMeasured, Stations

log = logging.getLogger(__name__)


class PipelinedModel:
    """`engine.step.SteadyModel` over the members of a group. The leader holds no layers and no keys.

    Stages work on different parts at the same time: of up to `depth` steps, or of one that is alone and goes out in as
    many. That is as many as there are stages unless said otherwise. Once a member is lost, `lost` says so and every
    step fails until `reset`; steps that are in flight then are over.
    """

    def __init__(
        self,
        plans: Sequence[PlanPort],
        outputs: Sequence[Inlet],
        *,
        depth: int,
        num_microbatches: int = 1,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`plans` lead to all members; `outputs` come from the last stage, in the order of its ranks.

        A member takes each part through its layers in `num_microbatches`, where its experts are in other processes.
        """
        self.stations: Stations = NotMeasured()  # the engine gives it its own
        self.depth = depth
        self.num_microbatches = num_microbatches
        self.lost: UnavailableError | None = None
        self._plans = plans
        self._outputs = outputs
        self._timeout_s = timeout_s

    def reset(self, plans: Sequence[PlanPort], outputs: Sequence[Inlet]) -> None:
        """Go on with a group that was formed anew, whose members hold no keys; see `EngineCore.renew`."""
        self._plans, self._outputs, self.lost = plans, outputs, None

    def forward(self, batch: Batch, cache: KVCache, dispatcher: Dispatcher) -> Tensor:
        """Have a step computed while no other is in flight; what `submit` and `collect` do. The cache is empty."""
        return self.collect(self.submit(batch, self.depth), dispatcher)

    def submit(self, batch: Batch, num_parts: int) -> tuple[Batch, ...]:
        """Send a step to all members in at most so many parts; return them for `collect`.

        UnavailableError (WORKER_LOST) where a member is known to be gone.
        """
        parts = split_batch(replace(batch, num_microbatches=self.num_microbatches), num_parts)
        with self._losing(batch.step):
            for part in parts:
                for plan in self._plans:
                    plan.submit(part)
        return parts

    def collect(self, parts: Sequence[Batch], dispatcher: Dispatcher) -> Tensor:
        """Wait for the oldest step that was submitted and return the float32 logits [P, V] of its `logit_rows`.

        Raises the first error of a stage; UnavailableError (WORKER_LOST) where a member is gone. What members prove of
        hosts is noted in the counters of `dispatcher`, which is the leader's and sends nothing.
        """
        with self._losing(parts[0].step):
            outputs = [self._collect(part, dispatcher) for part in parts]  # of all parts: no output is left behind
        for output in outputs:
            if isinstance(output, Llama4Error):
                raise output
        logits = [output for output in outputs if isinstance(output, Tensor)]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    @contextmanager
    def _losing(self, step: int) -> Iterator[None]:
        """Refuse to begin once the group is lost, and note when it is."""
        if self.lost is not None:
            raise self.lost
        try:
            yield
        except UnavailableError as error:
            if is_lost(error):
                log.error("stage_group_lost step=%d cause=%s", step, error)
                self.lost = error
            raise

    def _collect(self, part: Batch, dispatcher: Dispatcher) -> Tensor | Llama4Error:
        """Return the logits of a part, the ranks' vocabularies side by side, or why there are none."""
        columns: list[Tensor] = []
        failure: Llama4Error | None = None
        for inlet in self._outputs:
            output = take_output(inlet, part, self._timeout_s)
            dispatcher.stats().wrong_answers.update(output.wrong_answers)
            if isinstance(output.rows, Tensor):
                columns.append(output.rows)
                continue
            if is_lost(output.rows):
                raise output.rows
            failure = failure or output.rows
        return failure or (columns[0] if len(columns) == 1 else torch.cat(columns, dim=1))
