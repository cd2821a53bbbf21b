"""Runs requests on an engine for a caller that waits; several threads may wait at once. Knows no text and no prompt."""

import queue
import threading
from collections import deque
from collections.abc import Mapping, Sequence

from llama4_dist.engine.port import Engine
from llama4_dist.errors import OverloadedError
from llama4_dist.request import EngineRequest, TokenOutput
from llama4_dist.text.output_sequence import Finished
from llama4_dist.text.request_state import RequestState

RETRY_S = 0.1  # while other callers fill the engine's queue


class Runner:
    """Owns an engine's outputs and hands each to the call that waits for it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inboxes: dict[str, queue.SimpleQueue[TokenOutput]] = {}
        self._lock = threading.Lock()
        engine.start(self._deliver)

    def run(self, states: Sequence[RequestState]) -> None:
        """Return when every request is done. If one fails, or the caller is interrupted, abort them all and raise."""
        inbox: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
        waiting = deque(request for state in states for request in state.engine_requests())
        owners = {key: state for state in states for key in state.running}
        unfinished = set(owners)
        with self._lock:
            self._inboxes.update(dict.fromkeys(owners, inbox))
        try:
            while unfinished:
                self._submit(waiting)
                self._advance(inbox, owners, unfinished, wait_s=RETRY_S if waiting else None)
        finally:
            with self._lock:
                for key in owners:
                    del self._inboxes[key]
            # Empty unless we are leaving by an exception; an id that was never submitted is no error.
            for key in unfinished:
                self._engine.abort(key)

    def _submit(self, waiting: deque[EngineRequest]) -> None:
        """Submit until the engine's queue is full; the rest follows when something has ended."""
        while waiting:
            try:
                self._engine.submit(waiting[0])
            except OverloadedError as error:
                if error.reason != OverloadedError.reason:
                    raise  # no waiting makes it fit
                return
            waiting.popleft()

    def _advance(
        self,
        inbox: "queue.SimpleQueue[TokenOutput]",
        owners: Mapping[str, RequestState],
        unfinished: set[str],
        *,
        wait_s: float | None,
    ) -> None:
        """Take outputs until a sequence ends or `wait_s` pass without one: only then is there something to do."""
        while True:
            try:
                output = inbox.get(timeout=wait_s)
            except queue.Empty:
                return
            for event in owners[output.request_id].push(output):
                if isinstance(event, Finished):
                    unfinished.discard(output.request_id)
                    if event.abort is not None:
                        self._engine.abort(event.abort)
                    return

    def _deliver(self, outputs: Sequence[TokenOutput]) -> None:
        """Take one step's outputs; called on the engine's thread. The last words of what was aborted have no reader."""
        with self._lock:
            for output in outputs:
                inbox = self._inboxes.get(output.request_id)
                if inbox is not None:
                    inbox.put(output)
