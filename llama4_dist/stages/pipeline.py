"""The model as a leader sees it: a step goes out in parts to all members, logits come back from the last stage."""

import logging
from collections.abc import Sequence
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
    """`engine.step.ForwardModel` over the members of a group. The leader holds no layers and no keys.

    Stages work on different parts of a step at the same time; a step has `num_parts` of them, as many as there are
    stages unless said otherwise. Once a member is lost, `lost` says so and every step fails until `reset`.
    """

    def __init__(
        self,
        plans: Sequence[PlanPort],
        outputs: Sequence[Inlet],
        *,
        num_parts: int,
        num_microbatches: int = 1,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`plans` lead to all members; `outputs` come from the last stage, in the order of its ranks.

        A member takes each part through its layers in `num_microbatches`, where its experts are in other processes.
        """
        self.stations: Stations = NotMeasured()  # the engine gives it its own
        self.num_parts = num_parts
        self.num_microbatches = num_microbatches
        self.lost: UnavailableError | None = None
        self._plans = plans
        self._outputs = outputs
        self._timeout_s = timeout_s

    def reset(self, plans: Sequence[PlanPort], outputs: Sequence[Inlet]) -> None:
        """Go on with a group that was formed anew, whose members hold no keys; see `EngineCore.renew`."""
        self._plans, self._outputs, self.lost = plans, outputs, None

    def forward(self, batch: Batch, cache: KVCache, dispatcher: Dispatcher) -> Tensor:
        """Have a step computed and return the float32 logits [P, V] of `batch.logit_rows`.

        Raises the first error of a stage; UnavailableError (WORKER_LOST) where a member is gone. The cache and the
        dispatcher are the leader's, which are empty; what members prove of hosts is noted in the dispatcher's counters.
        """
        if self.lost is not None:
            raise self.lost
        try:
            return self._forward(batch, dispatcher)
        except UnavailableError as error:
            if is_lost(error):
                log.error("stage_group_lost step=%d cause=%s", batch.step, error)
                self.lost = error
            raise

    def _forward(self, batch: Batch, dispatcher: Dispatcher) -> Tensor:
        parts = split_batch(replace(batch, num_microbatches=self.num_microbatches), self.num_parts)
        for part in parts:
            for plan in self._plans:
                plan.submit(part)
        outputs = [self._collect(part, dispatcher) for part in parts]  # of all parts: no output is left behind
        for output in outputs:
            if isinstance(output, Llama4Error):
                raise output
        logits = [output for output in outputs if isinstance(output, Tensor)]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

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
