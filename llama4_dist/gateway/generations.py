"""The ledger of running requests: starts them in the engine, lets calls join them, and aborts what nobody reads.

One callback per engine step crosses from the engine's thread to the event loop; everything else here is the loop's.
"""

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from llama4_dist.engine.port import Engine, is_last, unknown_request
from llama4_dist.errors import DuplicateRequestError, Llama4Error, UnavailableError
from llama4_dist.gateway.delivery import Delivery
from llama4_dist.gateway.engine_ids import EngineIds
from llama4_dist.gateway.leaving import Leaving
from llama4_dist.gateway.metrics import Metrics
from llama4_dist.gateway.prompt import tokenise
from llama4_dist.gateway.resuming import check_resume, reached
from llama4_dist.gateway.running import RunningRequest
from llama4_dist.request import FinishReason, TokenOutput
from llama4_dist.rpc.wire import GenerationCall
from llama4_dist.telemetry import tracing
from llama4_dist.telemetry.logs import bound
from llama4_dist.telemetry.tracing import OpenSpan, ours
from llama4_dist.text.output_sequence import Delta, Finished
from llama4_dist.text.request_state import RequestState
from llama4_dist.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Generations:
    """Requests by (tenant, request id) and sequences by the id the engine knows them by.

    Engine ids are made here and never come from a client, so no client can name another's sequence.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, metrics: Metrics, ids: EngineIds) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._ids = ids
        self._requests: dict[tuple[str, str], RunningRequest] = {}
        self._sequences: dict[str, RunningRequest] = {}
        self._leaving = Leaving()
        self._loop = asyncio.get_running_loop()
        self._delivery = Delivery(self._loop, self._take, on_step=metrics.stream_seconds.observe)
        self.last_unavailable_s: float | None = None  # on the loop's clock

    def start(self) -> None:
        """Begin to receive the engine's outputs."""
        self._engine.start(self._on_outputs)

    @property
    def num_running(self) -> int:
        return len(self._requests)

    @asynccontextmanager
    async def open(
        self,
        call: GenerationCall,
        *,
        tenant: str,
        body: bytes,
        timeout_s: float,
        resume: tuple[int, ...] | None = None,
        trace: str = "",
    ) -> AsyncIterator[RunningRequest]:
        """Join the running request of that id and body, or start one; abort it when its last reader leaves.

        With `resume` none is started: it runs here, or is taken over from a gateway that is gone, or is not found.
        `trace` is the caller's `traceparent`, if it has one.
        """
        prompt_token_ids = await tokenise(call, self._tokenizer, self._engine.limits)
        if resume is not None:
            check_resume(call, resume)
        request_id = call.request_id or uuid.uuid4().hex
        key = (tenant, request_id)
        if key not in self._requests:
            await self._leaving.gone(self._ids.engine_id(tenant, request_id), request_id)
        running = self._requests.get(key)
        if running is None:
            running = self._start(key, call, prompt_token_ids, body, timeout_s, attach=resume is not None, trace=trace)
            self._requests[key] = running
        elif not secrets.compare_digest(running.body, body):
            if resume is not None:
                raise unknown_request()
            raise DuplicateRequestError(
                f"request {request_id} is running with another body: wait for it, or choose another id",
                metadata={"request_id": request_id},
            )
        running.num_readers += 1
        with bound(request_id=request_id, trace_id=running.span.trace_id):
            try:
                if resume is not None:
                    await reached(running, resume)
                yield running
            finally:
                running.num_readers -= 1
                if running.num_readers == 0:
                    del self._requests[key]
                    self._leave(running)

    def _leave(self, running: RunningRequest) -> None:
        """Part with a request that nobody reads any more."""
        log.info(
            "request_ended id=%s engine_id=%s prompt_tokens=%d tokens=%d seconds=%.3f outcome=%s",
            running.request_id,
            running.state.request_id,
            running.state.usage.prompt_tokens,
            running.state.usage.completion_tokens,
            self._loop.time() - running.started_s,
            running.outcome,
        )
        self._release(running)
        running.span.end("" if running.state.done and running.error is None else running.outcome)

    def fail_all(self, error: Llama4Error) -> None:
        """End every request with `error`: the last resort of a shutdown."""
        for running in list(self._requests.values()):
            running.error = running.error or error
            self._release(running)
            running.wake()

    def _start(
        self,
        key: tuple[str, str],
        call: GenerationCall,
        prompt_token_ids: tuple[int, ...],
        body: bytes,
        timeout_s: float,
        *,
        attach: bool,
        trace: str,
    ) -> RunningRequest:
        sampling = call.sampling
        if sampling.seed is None:
            sampling = replace(sampling, seed=self._ids.seed(*key))
        state = RequestState(
            request_id=self._ids.engine_id(*key),
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            limits=self._engine.limits,
            tokenizer=self._tokenizer,
            timeout_s=timeout_s,
            priority=call.priority,
        )
        span = begin_span(state, key[1], trace)
        running = RunningRequest(key[1], state, body=body, now_s=self._loop.time(), attached=attach, span=span)
        give = self._engine.attach if attach else self._engine.submit
        for request in state.engine_requests():
            self._sequences[request.request_id] = running
            try:
                give(replace(request, digest=body, tenant=self._ids.tenant(key[0]), trace=span.traceparent))
            except BaseException as error:
                del self._sequences[request.request_id]
                self._release(running)
                self._note(error)
                span.end(error.reason if isinstance(error, Llama4Error) else type(error).__name__)
                raise
        return running

    def _release(self, running: RunningRequest) -> None:
        """Forget a request's sequences, and abort those the engine may still run."""
        for engine_id in running.state.running:
            if self._sequences.pop(engine_id, None) is not None:
                self._abort(engine_id)

    def _abort(self, engine_id: str) -> None:
        self._leaving.add(engine_id)
        self._engine.abort(engine_id)

    def _on_outputs(self, outputs: Sequence[TokenOutput]) -> None:
        """Hand one step's outputs to the loop; called on the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._delivery.arrive, tuple(outputs), time.perf_counter())
        except RuntimeError:  # the server is gone, and so is every reader
            log.info("outputs_dropped reason=loop_closed")

    def _take(self, output: TokenOutput, now_s: float) -> RunningRequest | None:
        """Add one output to the record of its request and return that."""
        running = self._sequences.get(output.request_id)
        if running is None:
            self._leaving.hear(output)
            return None
        was_behind = not running.caught_up
        events = running.take(output)
        if not was_behind:  # what is caught up with was generated long ago
            self._observe(running, sum([len(event.token_ids) for event in events if isinstance(event, Delta)]), now_s)
        for event in events:
            if isinstance(event, Finished):
                self._end(running, output, event, now_s)
        if running.error is not None:
            self._note(running.error)
            self._sequences.pop(output.request_id, None)
            self._release(running)
            self._metrics.requests.labels("error").inc()
            running.span.end(running.error.reason)
        return running

    def _note(self, error: BaseException) -> None:
        if isinstance(error, UnavailableError):
            self.last_unavailable_s = self._loop.time()

    def _end(self, running: RunningRequest, output: TokenOutput, end: Finished, now_s: float) -> None:
        del self._sequences[output.request_id]
        self._metrics.requests.labels(end.finish_reason.value).inc()
        if running.state.done and not running.attached and end.finish_reason is not FinishReason.CANCELLED:
            self._metrics.request_seconds.observe(now_s - running.started_s)
        running.span.event("finished", ours(sequence=end.index, finish_reason=end.finish_reason.value))
        if running.state.done:
            running.span.end()
        if not is_last(output):
            self._abort(output.request_id)  # a stop string ended it; the engine knows no strings

    def _observe(self, running: RunningRequest, num_tokens: int, now_s: float) -> None:
        if num_tokens == 0:
            return
        if running.attached and running.last_token_s is None:
            running.last_token_s = now_s
            return
        if running.last_token_s is None:
            self._metrics.first_token_seconds.observe(now_s - running.started_s)
            queue_s = running.state.queue_s or 0.0
            self._metrics.queue_seconds.observe(queue_s)
            running.span.event("admitted", after_s=queue_s)
            running.span.event("first_token")
        elif running.state.sampling.n == 1:
            self._metrics.inter_token_seconds.observe((now_s - running.last_token_s) / num_tokens)
        running.last_token_s = now_s


def begin_span(state: RequestState, request_id: str, trace: str) -> OpenSpan:
    """Begin the span of a request, if this process traces; its prompt stays out of it."""
    said = ours(
        request_id=request_id,
        engine_id=state.request_id,
        prompt_tokens=state.usage.prompt_tokens,
        sequences=state.sampling.n,
    )
    return tracing.begin("generate", trace, said, kind="SERVER")


def shutting_down() -> UnavailableError:
    """Build the error of requests that a shutdown cuts off."""
    return UnavailableError("the server is shutting down; try another one", reason="DRAINING", retry_after_s=1.0)
