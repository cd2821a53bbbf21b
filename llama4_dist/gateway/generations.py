"""The ledger of running requests: starts them in the engine, lets calls join them, and aborts what nobody reads.

One callback per engine step crosses from the engine's thread to the event loop; everything else here is the loop's.
"""

import asyncio
import logging
import secrets
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from llama4_dist.engine.port import Engine
from llama4_dist.errors import DuplicateRequestError, Llama4Error, UnavailableError
from llama4_dist.gateway.metrics import Metrics
from llama4_dist.gateway.prompt import tokenise
from llama4_dist.gateway.running import RunningRequest
from llama4_dist.request import TokenOutput
from llama4_dist.rpc.wire import GenerationCall
from llama4_dist.text.output_sequence import Finished
from llama4_dist.text.request_state import RequestState
from llama4_dist.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Generations:
    """Requests by (tenant, request id) and sequences by the id the engine knows them by.

    Engine ids are drawn here and never come from a client, so no client can name another's sequence.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, metrics: Metrics) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._requests: dict[tuple[str, str], RunningRequest] = {}
        self._sequences: dict[str, RunningRequest] = {}
        self._loop = asyncio.get_running_loop()
        self.last_unavailable_s: float | None = None  # on the loop's clock

    def start(self) -> None:
        """Begin to receive the engine's outputs."""
        self._engine.start(self._on_outputs)

    @property
    def num_running(self) -> int:
        return len(self._requests)

    @asynccontextmanager
    async def open(
        self, call: GenerationCall, *, tenant: str, body: bytes, timeout_s: float
    ) -> AsyncIterator[RunningRequest]:
        """Join the running request of that id and body, or start one; abort it when its last reader leaves."""
        prompt_token_ids = await tokenise(call, self._tokenizer, self._engine.limits)
        request_id = call.request_id or uuid.uuid4().hex
        key = (tenant, request_id)
        running = self._requests.get(key)
        if running is None:
            running = self._submit(request_id, call, prompt_token_ids, body, timeout_s)
            self._requests[key] = running
        elif not secrets.compare_digest(running.body, body):
            raise DuplicateRequestError(
                f"request {request_id} is running with another body: wait for it, or choose another id",
                metadata={"request_id": request_id},
            )
        running.num_readers += 1
        try:
            yield running
        finally:
            running.num_readers -= 1
            if running.num_readers == 0:
                del self._requests[key]
                log.info(
                    "request_ended id=%s engine_id=%s prompt_tokens=%d tokens=%d seconds=%.3f outcome=%s",
                    request_id,
                    running.state.request_id,
                    running.state.usage.prompt_tokens,
                    running.state.usage.completion_tokens,
                    self._loop.time() - running.started_s,
                    running.outcome,
                )
                self._release(running)

    def fail_all(self, error: Llama4Error) -> None:
        """End every request with `error`: the last resort of a shutdown."""
        for running in list(self._requests.values()):
            running.error = running.error or error
            self._release(running)
            running.wake()

    def _submit(
        self, request_id: str, call: GenerationCall, prompt_token_ids: tuple[int, ...], body: bytes, timeout_s: float
    ) -> RunningRequest:
        state = RequestState(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt_token_ids,
            sampling=call.sampling,
            limits=self._engine.limits,
            tokenizer=self._tokenizer,
            timeout_s=timeout_s,
            priority=call.priority,
        )
        running = RunningRequest(request_id, state, body=body, now_s=self._loop.time())
        try:
            for request in state.engine_requests():
                self._sequences[request.request_id] = running
                self._engine.submit(request)
        except BaseException as error:
            self._release(running)
            self._note(error)
            raise
        return running

    def _release(self, running: RunningRequest) -> None:
        """Forget a request's sequences, and abort those the engine may still run."""
        for engine_id in running.state.running:
            if self._sequences.pop(engine_id, None) is not None:
                self._engine.abort(engine_id)

    def _on_outputs(self, outputs: Sequence[TokenOutput]) -> None:
        """Hand one step's outputs to the loop; called on the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._deliver, tuple(outputs))
        except RuntimeError:
            log.info("outputs_dropped reason=loop_closed")  # the server is gone, and so is every reader

    def _deliver(self, outputs: Sequence[TokenOutput]) -> None:
        now_s = self._loop.time()
        touched: set[RunningRequest] = set()
        for output in outputs:
            running = self._sequences.get(output.request_id)
            if running is None:
                continue  # released; these are its last words
            for event in running.take(output):
                if isinstance(event, Finished):
                    self._end(output.request_id, event)
                else:
                    self._observe(running, len(event.token_ids), now_s)
            if running.error is not None:
                self._note(running.error)
                self._sequences.pop(output.request_id, None)
                self._release(running)
                self._metrics.requests.labels("error").inc()
            touched.add(running)
        for running in touched:
            running.wake()

    def _note(self, error: BaseException) -> None:
        if isinstance(error, UnavailableError):
            self.last_unavailable_s = self._loop.time()

    def _end(self, engine_id: str, end: Finished) -> None:
        del self._sequences[engine_id]
        self._metrics.requests.labels(end.finish_reason.value).inc()
        if end.abort is not None:
            self._engine.abort(end.abort)  # a stop string ended it; the engine knows no strings

    def _observe(self, running: RunningRequest, num_tokens: int, now_s: float) -> None:
        if num_tokens == 0:
            return
        if running.last_token_s is None:
            self._metrics.first_token_seconds.observe(now_s - running.started_s)
            self._metrics.queue_seconds.observe(running.state.queue_s or 0.0)
        elif running.state.sampling.n == 1:
            self._metrics.inter_token_seconds.observe((now_s - running.last_token_s) / num_tokens)
        running.last_token_s = now_s


def shutting_down() -> UnavailableError:
    """Build the error of requests that a shutdown cuts off."""
    return UnavailableError("the server is shutting down; try another one", reason="DRAINING", retry_after_s=1.0)
