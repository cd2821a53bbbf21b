"""Collects what an engine emits and lets a test wait for it."""

import threading
from collections.abc import Callable, Sequence

from llama4_dist.engine.port import is_last
from llama4_dist.request import TokenOutput
from tests.waiting import PATIENCE_S


class Collector:
    """Give `collector` to `start`; a wait that lasts too long ends with an AssertionError."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.calls: list[list[TokenOutput]] = []
        self.threads: set[int] = set()
        self._changed = threading.Condition()

    def __call__(self, outputs: Sequence[TokenOutput]) -> None:
        with self._changed:
            self.threads.add(threading.get_ident())
            self.calls.append(list(outputs))
            for output in outputs:
                previous = self.outputs.setdefault(output.request_id, [])
                assert not (previous and is_last(previous[-1])), f"{output} follows the last output"
                previous.append(output)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_S), f"waited in vain; have {self.outputs}"

    def wait_for(self, *request_ids: str) -> list[TokenOutput]:
        """Wait until all of these ended; return the outputs of the first."""
        self.wait(lambda: all(name in self.outputs and is_last(self.outputs[name][-1]) for name in request_ids))
        return self.outputs[request_ids[0]]

    def forget(self, request_id: str) -> None:
        with self._changed:
            self.outputs.pop(request_id, None)
