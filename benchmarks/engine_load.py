"""A closed loop of requests on an engine of this process, each recorded; it can be held up. Measures nothing."""

import itertools
import sys
import threading
from collections.abc import Sequence

from llama4_dist.chaos.cases import Case
from llama4_dist.chaos.history import History
from llama4_dist.engine.port import Engine, is_last
from llama4_dist.errors import Llama4Error
from llama4_dist.request import EngineRequest, TokenOutput
from tests.faults.engine_history import EngineHistory

END_TIMEOUT_S = 120.0


class Load:
    """A closed loop of requests on an engine, which can be held up."""

    def __init__(
        self, engine: Engine, history: History, cases: Sequence[Case], num_streams: int, *, prefix: str
    ) -> None:
        self._engine = engine
        self._prefix = prefix
        self._record = EngineHistory(history, then=self._on_outputs)
        self._cases = itertools.cycle(cases)
        self._numbers = itertools.count()
        self._num_streams = num_streams
        self._lock = threading.Lock()
        self._open = False
        self._due = 0
        self._wake = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._submit_due, daemon=True)

    def begin(self) -> None:
        """Take the engine's outputs; no request yet."""
        self._engine.start(self._record)
        self._thread.start()

    def resume(self) -> None:
        """Let requests run."""
        self._open = True
        for _ in range(self._num_streams):
            self._wake.release()

    def pause(self) -> None:
        """Begin no more, and wait for those that run."""
        self._open = False
        self._record.wait(END_TIMEOUT_S)

    def _submit_due(self) -> None:
        while True:
            self._wake.acquire()
            if not self._open:
                continue
            case = next(self._cases)
            request = EngineRequest(
                request_id=f"{self._prefix}-{next(self._numbers)}", prompt_token_ids=case.prompt, sampling=case.sampling
            )
            try:
                self._record.submit(self._engine, request)
            except Llama4Error as error:  # recorded as a refusal: the verdict names it
                print(f"refused: {error}", file=sys.stderr)

    def _on_outputs(self, outputs: Sequence[TokenOutput]) -> None:
        for _ in range(sum(map(is_last, outputs))):
            self._wake.release()
