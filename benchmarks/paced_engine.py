"""An engine without a model that steps at fixed times, so that what is measured is the gateway's own.

A token's id is the number of its step modulo the vocabulary, and the time at which each step was handed out is kept:
a client of the same machine so knows how long any token was on its way.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from llama4_dist.engine.port import EngineStats, OnOutputs, unknown_request
from llama4_dist.errors import OverloadedError
from llama4_dist.request import EngineLimits, EngineRequest, FinishReason, TokenOutput

VOCAB_SIZE = 200_000


@dataclass(slots=True, kw_only=True, eq=False)
class Slot:
    """A sequence that runs."""

    request_id: str
    num_left: int
    queue_s: float | None


class PacedEngine:
    """Gives each of at most `max_running` sequences a token every `step_s`; more wait in order of arrival."""

    def __init__(self, *, step_s: float, max_running: int, max_waiting: int) -> None:
        self.limits = EngineLimits(model="paced", vocab_size=VOCAB_SIZE, max_context=1 << 20, max_waiting=max_waiting)
        self.step_times_s: list[float] = []  # of step number i, when its tokens were handed out
        self._step_s = step_s
        self._max_running = max_running
        self._running: dict[str, Slot] = {}
        self._waiting: deque[tuple[EngineRequest, float]] = deque()
        self._aborted: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._on_outputs: OnOutputs = lambda outputs: None
        self._thread = threading.Thread(target=self._run, name="paced-engine", daemon=True)

    def start(self, on_outputs: OnOutputs) -> None:
        self._on_outputs = on_outputs
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        with self._lock:
            if len(self._waiting) >= self.limits.max_waiting:
                raise OverloadedError(f"{len(self._waiting)} requests wait", retry_after_s=1.0)
            self._waiting.append((request, time.monotonic()))

    def attach(self, request: EngineRequest) -> None:
        self._on_outputs([TokenOutput(request_id=request.request_id, error=unknown_request())])

    def abort(self, request_id: str) -> None:
        with self._lock:
            self._aborted.add(request_id)

    def score(self, token_ids: Sequence[int], *, chunk_size: int | None = None) -> Tensor:
        raise NotImplementedError("an engine without a model has no logits")

    def stats(self) -> EngineStats:
        with self._lock:
            oldest_s = self._waiting[0][1] if self._waiting else time.monotonic()
            return EngineStats(
                requests_running=len(self._running),
                requests_waiting=len(self._waiting),
                steps=len(self.step_times_s),
                max_queue_age_s=time.monotonic() - oldest_s,
            )

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        next_s = time.monotonic()
        while not self._stop.wait(max(0.0, next_s - time.monotonic())):
            next_s = max(next_s + self._step_s, time.monotonic())  # a late step is not made up for
            outputs = self._step(len(self.step_times_s) % VOCAB_SIZE)
            self.step_times_s.append(time.monotonic())
            if outputs:
                self._on_outputs(outputs)

    def _step(self, token_id: int) -> list[TokenOutput]:
        with self._lock:
            outputs = [self._cancel(request_id) for request_id in self._aborted]
            self._aborted.clear()
            now_s = time.monotonic()
            while self._waiting and len(self._running) < self._max_running:
                request, arrived_s = self._waiting.popleft()
                self._running[request.request_id] = Slot(
                    request_id=request.request_id,
                    num_left=request.sampling.max_tokens or 1,
                    queue_s=now_s - arrived_s,
                )
            outputs += [self._advance(slot, token_id) for slot in self._running.values()]
            for output in outputs:
                if output.finish_reason is not None:
                    self._running.pop(output.request_id, None)
            return outputs

    def _advance(self, slot: Slot, token_id: int) -> TokenOutput:
        slot.num_left -= 1
        queue_s, slot.queue_s = slot.queue_s, None
        return TokenOutput(
            request_id=slot.request_id,
            token_ids=(token_id,),
            finish_reason=None if slot.num_left else FinishReason.LENGTH,
            queue_s=queue_s,
        )

    def _cancel(self, request_id: str) -> TokenOutput:
        self._waiting = deque(entry for entry in self._waiting if entry[0].request_id != request_id)
        return TokenOutput(request_id=request_id, finish_reason=FinishReason.CANCELLED)
