"""Several engines behind one port: each request goes to the least loaded one that takes it; knows no transport."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

from torch import Tensor

from llama4_dist.engine.port import Engine, EngineStats, OnOutputs, is_last
from llama4_dist.engine.snapshot import add_stats
from llama4_dist.errors import DuplicateRequestError, OverloadedError, UnavailableError
from llama4_dist.request import EngineLimits, EngineRequest, TokenOutput

log = logging.getLogger(__name__)
T = TypeVar("T")


class EngineGroup:
    """`Engine` over engines of the same model. A request stays with the engine that took it."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        if not engines:
            raise ValueError("a group needs at least one engine")
        self._engines = tuple(engines)
        self._on_outputs: OnOutputs = lambda outputs: None
        self._lock = threading.Lock()
        self._emitting = threading.Lock()
        self._owner: dict[str, int] = {}  # request id to engine
        self._live: Counter[int] = Counter()  # engine to its live requests

    @property
    def limits(self) -> EngineLimits:
        """Return the limits of the engine with the smallest context: what any of them takes."""
        return min((engine.limits for engine in self._engines), key=lambda limits: limits.max_context)

    def start(self, on_outputs: OnOutputs) -> None:
        """Start every engine; `on_outputs` is never called by two at once."""
        self._on_outputs = on_outputs
        for engine in self._engines:
            engine.start(self._emit)

    def submit(self, request: EngineRequest) -> None:
        """Give the request to the least loaded engine; one that is down or full is passed over."""
        with self._lock:
            if request.request_id in self._owner:
                raise DuplicateRequestError(f"request {request.request_id} is running: choose another id")
            self._owner[request.request_id] = -1  # taken, by nobody yet
        try:
            self._try_each(lambda index: self._submit_to(index, request))
        except BaseException:
            with self._lock:
                self._owner.pop(request.request_id, None)
            raise

    def abort(self, request_id: str) -> None:
        with self._lock:
            index = self._owner.get(request_id, -1)
        if index >= 0:
            self._engines[index].abort(request_id)

    def score(self, token_ids: Sequence[int], *, chunk_size: int | None = None) -> Tensor:
        """Score on the least loaded engine that can."""
        return self._try_each(lambda index: self._engines[index].score(token_ids, chunk_size=chunk_size))

    def stats(self) -> EngineStats:
        """Return sums over the engines that answer; the queue age is the largest. UnavailableError if none does."""
        answers: list[EngineStats] = []
        refusal: UnavailableError | None = None
        for engine in self._engines:
            try:
                answers.append(engine.stats())
            except UnavailableError as error:
                refusal = error
        if refusal is not None and not answers:
            raise refusal
        return add_stats(answers)

    def close(self) -> None:
        """Close every engine, also when closing one of them fails."""
        with ExitStack() as stack:
            for engine in self._engines:
                stack.callback(engine.close)

    def _try_each(self, act: Callable[[int], T]) -> T:
        with self._lock:
            by_load = sorted(range(len(self._engines)), key=lambda index: (self._live[index], index))
        refusals: list[UnavailableError | OverloadedError] = []
        for index in by_load:
            try:
                return act(index)
            except (UnavailableError, OverloadedError) as error:
                log.debug("engine_passed_over engine=%d reason=%s", index, error.reason)
                refusals.append(error)
        # A full queue says more than a dead engine: coming back later helps.
        raise next((error for error in refusals if isinstance(error, OverloadedError)), refusals[0])

    def _submit_to(self, index: int, request: EngineRequest) -> None:
        # Owned before it is submitted: its first output may come before `submit` returns.
        with self._lock:
            self._owner[request.request_id] = index
            self._live[index] += 1
        try:
            self._engines[index].submit(request)
        except BaseException:
            with self._lock:
                self._live[index] -= 1
            raise

    def _emit(self, outputs: Sequence[TokenOutput]) -> None:
        with self._lock:
            for output in outputs:
                if is_last(output) and (index := self._owner.pop(output.request_id, -1)) >= 0:
                    self._live[index] -= 1
        with self._emitting:
            self._on_outputs(outputs)
