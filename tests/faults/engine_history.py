"""Records requests given to an engine directly, past the gateway; otherwise as a client's stream is recorded."""

import threading
from collections.abc import Callable, Sequence

from llama4_dist.chaos.history.recorder import History, Recorder
from llama4_dist.client.results import Delta
from llama4_dist.engine.port import Engine, is_last
from llama4_dist.errors import Llama4Error
from llama4_dist.request import EngineRequest, TokenOutput


class EngineHistory:
    """Give it to `engine.start`, and submit through it; `wait` until all that was submitted has ended."""

    def __init__(self, history: History, then: Callable[[Sequence[TokenOutput]], None] | None = None) -> None:
        self._history, self._then = history, then
        self._recorders: dict[str, Recorder] = {}  # all that ever were: what comes after an end is recorded too
        self._running: set[str] = set()
        self._changed = threading.Condition()

    def submit(self, engine: Engine, request: EngineRequest) -> None:
        """Submit and record; a refusal is recorded and raised."""
        recorder = Recorder(
            self._history,
            request_id=request.request_id,
            prompt=request.prompt_token_ids,
            sampling=request.sampling,
            first_position=len(request.output_token_ids),
        )
        recorder.submitted()
        with self._changed:
            self._recorders[request.request_id] = recorder
            self._running.add(request.request_id)
        try:
            engine.submit(request)
        except Llama4Error as error:
            recorder.failed(error)
            self._end(request.request_id)
            raise

    def __call__(self, outputs: Sequence[TokenOutput]) -> None:
        for output in outputs:
            recorder = self._recorders[output.request_id]
            if output.token_ids or output.finish_reason is not None:
                recorder.delta(Delta(index=0, token_ids=output.token_ids, finish_reason=output.finish_reason))
            if output.error is not None:
                recorder.failed(output.error)
            if is_last(output):
                self._end(output.request_id)
        if self._then is not None:
            self._then(outputs)

    def wait(self, timeout_s: float) -> None:
        """Wait until every submitted request has ended; AssertionError names those that have not."""
        with self._changed:
            ended = self._changed.wait_for(lambda: not self._running, timeout_s)
            assert ended, f"still running after {timeout_s} s: {sorted(self._running)}"

    def _end(self, request_id: str) -> None:
        with self._changed:
            self._running.discard(request_id)
            self._changed.notify_all()
