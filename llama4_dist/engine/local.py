"""An engine in a thread of this process: an inbox in front of `EngineCore`, which alone touches model and cache."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama4_dist.engine import scorer
from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.intake import check_fits
from llama4_dist.engine.port import EngineStats, OnOutputs, is_last, unknown_request
from llama4_dist.engine.score_queue import ScoreQueue
from llama4_dist.engine.snapshot import snapshot
from llama4_dist.errors import (
    DuplicateRequestError,
    EngineError,
    Llama4Error,
    OverloadedError,
    UnavailableError,
)
from llama4_dist.request import EngineLimits, EngineRequest, TokenOutput

log = logging.getLogger(__name__)
T = TypeVar("T")

HELD_RETRY_S = 0.02  # between two tries of a step that no host can serve


class LocalEngine:
    """`Engine` over an `EngineCore`. Commands run on the engine's thread between steps, in the order they came."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.on_close: Callable[[], None] | None = None
        self._on_outputs: OnOutputs = lambda outputs: None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._scores = ScoreQueue(core)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._live: set[str] = set()
        self._aborting: set[str] = set()
        self._pending: set[Future[Any]] = set()
        self._outbox: list[TokenOutput] = []
        self._refusal: tuple[str, str] | None = ("the engine has not been started", "UNAVAILABLE")  # message, reason
        self._stop = False
        self._died = False
        self._num_scores = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def limits(self) -> EngineLimits:
        return self.core.limits

    def start(self, on_outputs: OnOutputs) -> None:
        """Start the engine's thread; once only."""
        with self._lock:
            if self._thread.ident is not None or self._stop:
                raise ValueError("an engine is started once; build another")
            self._on_outputs = on_outputs
            self._refusal = None
            self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request or raise; see `Engine`."""
        check_fits(request, self.limits)
        arrived_s = time.monotonic()
        with self._lock:
            self._check_open()
            if request.request_id in self._live:
                raise DuplicateRequestError(f"request {request.request_id} is running: choose another id")
            num_waiting = len(self._live) - len(self.core.scheduler.running)
            if num_waiting >= self.core.options.max_waiting:
                raise OverloadedError(
                    f"{num_waiting} requests wait, the queue holds {self.core.options.max_waiting}: come back later",
                    retry_after_s=self._retry_after_s(),
                )
            self._live.add(request.request_id)
            self._inbox.put(lambda: self._outbox.extend(self.core.add(request, arrived_s=arrived_s)))

    def attach(self, request: EngineRequest) -> None:
        """Answer NotFoundError: the one owner of this engine lives in this process."""
        with self._lock:
            self._check_open()
            if request.request_id in self._live:
                raise DuplicateRequestError(f"request {request.request_id} is running: it has its owner")
            answer = TokenOutput(request_id=request.request_id, error=unknown_request())
            self._inbox.put(lambda: self._outbox.append(answer))

    def abort(self, request_id: str) -> None:
        """Cancel a request before the next step; unknown and ended ids are no error."""
        with self._lock:
            if request_id in self._live and request_id not in self._aborting:
                self._aborting.add(request_id)
                self._inbox.put(lambda: self._outbox.extend(self.core.abort(request_id)))

    def score(self, token_ids: Sequence[int], *, chunk_size: int | None = None) -> Tensor:
        """Return float32 logits_TV on the CPU; chunks run between the steps of running requests."""
        with self._lock:
            self._num_scores += 1
            owner = f"score/{self._num_scores}"
        job = scorer.make_job(self.core, owner, token_ids, chunk_size)
        done: Future[None] = Future()
        self._put(lambda: self._scores.add(job, done), done)
        done.result()
        return torch.cat(job.parts)

    def between_steps(self, action: Callable[[], T]) -> T:
        """Run `action` on the engine's thread while no step runs and return its result (a table switch, say)."""

        def act() -> T:
            self.core.drain()
            return action()

        return self._call(act)

    def lose(self, error: Llama4Error) -> None:
        """End what runs before the next step: a member of the model's group is gone; see `EngineCore.lose`."""
        self._inbox.put(lambda: self._outbox.extend(self.core.lose(error)))

    def renew(self, reform: Callable[[], None]) -> None:
        """Have `reform` give the model its new group between two steps, and go on with an empty cache.

        Steps that the old group has in flight are waited for by nobody.
        """

        def act() -> None:
            reform()
            self._outbox += self.core.renew()

        self._call(act)

    def stats(self) -> EngineStats:
        """Return the counters of now; gauges may be a step old. UnavailableError once the engine's thread has died."""
        if self._died:
            self._check_open()
        return snapshot(self.core)

    def close(self, *, drain_timeout_s: float = 0.0) -> None:
        """Refuse new requests, let live ones end for `drain_timeout_s`, fail the rest as retriable, and stop."""
        with self._lock:
            started = self._thread.ident is not None
            self._refusal = ("the engine is shutting down", "DRAINING")
            self._stop = self._stop or not started
            self._idle.wait_for(lambda: not self._live or not self._thread.is_alive(), drain_timeout_s)
        if started:
            self._inbox.put(self._shut_down)
            if threading.current_thread() is not self._thread:
                self._thread.join()
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()

    def _check_open(self) -> None:
        if self._refusal is not None:
            message, reason = self._refusal
            raise UnavailableError(message, reason=reason)

    def _put(self, command: Callable[[], None], done: Future[T]) -> None:
        """Queue a command whose caller waits for `done`; `done` fails if the engine ends first."""
        if threading.current_thread() is self._thread:
            raise ValueError("on_outputs runs on the engine's thread and cannot wait for it: call from another thread")
        with self._lock:
            self._check_open()
            self._pending.add(done)
            done.add_done_callback(self._pending.discard)
            self._inbox.put(command)

    def _call(self, action: Callable[[], T]) -> T:
        """Run `action` on the engine's thread and return its result, or raise what it raises."""
        done: Future[T] = Future()

        def act() -> None:
            try:
                done.set_result(action())
            except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
                done.set_exception(error)

        self._put(act, done)
        return done.result()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stop:
                    self._obey()
                    self._scores.advance()
                    if self.core.has_work:
                        self._outbox += self.core.step()
                    self._flush()
        except BaseException:
            log.exception("engine_died")
            with self._lock:
                self._died = True
                self._refusal = ("the engine died; its log says why", "UNAVAILABLE")
                self._outbox += [
                    TokenOutput(request_id=request_id, error=EngineError("the engine died in this request"))
                    for request_id in sorted(self._live - {o.request_id for o in self._outbox if is_last(o)})
                ]
            self._fail_pending(UnavailableError("the engine died; its log says why"))
            self._flush()

    def _obey(self) -> None:
        """Carry out every command that came since the last step; sleep on the inbox when there is nothing else."""
        idle = not (self.core.has_work or self._scores)
        held = self.core.held_since_s is not None
        try:
            command = self._inbox.get(block=idle or held, timeout=None if idle else HELD_RETRY_S)
            while True:
                command()
                command = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _flush(self) -> None:
        """Hand out what this round produced, in one call."""
        outputs, self._outbox = self._outbox, []
        if not outputs:
            return
        ended = {output.request_id for output in outputs if is_last(output)}
        with self._lock:
            self._live -= ended
            self._aborting -= ended
            if not self._live:
                self._idle.notify_all()
        try:
            self._on_outputs(outputs)
        except Exception:
            log.exception("on_outputs_failed outputs=%d", len(outputs))

    def _shut_down(self) -> None:
        error = UnavailableError("the engine is shutting down", reason="DRAINING")
        self._outbox += self.core.fail_all(error)
        self._scores.drop()
        self._fail_pending(error)
        self._stop = True

    def _fail_pending(self, error: Llama4Error) -> None:
        for done in tuple(self._pending):
            done.set_exception(error)

    def _retry_after_s(self) -> float:
        """Guess when to come back: as long as the oldest request in the queue has waited, at least 0.1 s."""
        return min(60.0, max(0.1, snapshot(self.core).max_queue_age_s))
