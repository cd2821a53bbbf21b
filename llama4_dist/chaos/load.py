"""Streams of requests that never cease, each recorded token by token; does not know what is done to the servers."""

import itertools
import threading
from collections.abc import Sequence

from llama4_dist.chaos.cases import Case
from llama4_dist.chaos.history import History, recorded_stream
from llama4_dist.client import Client, ConnectOptions
from llama4_dist.errors import Llama4Error

REQUEST_TIMEOUT_S = 300.0


class Load:
    """So many clients, each with one request at a time: a closed loop, so that a stall shows as a gap, not as a queue.

    `rest_s` is the pause between two requests of a client.
    """

    def __init__(
        self,
        addresses: str,
        cases: Sequence[Case],
        history: History,
        *,
        num_streams: int,
        prefix: str,
        rest_s: float = 0.0,
    ) -> None:
        self._addresses = addresses
        self._cases = cases
        self._history = history
        self._prefix = prefix
        self._rest_s = rest_s
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"stream-{index}", daemon=True) for index in range(num_streams)
        ]
        self.num_tokens = 0
        self.num_done = 0
        self.num_failed = 0

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Begin no more requests and wait for those that run; tell whether all ended in time."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        with Client(self._addresses, ConnectOptions(timeout_s=REQUEST_TIMEOUT_S)) as client:
            while not self._stop.is_set():
                self._ask(client)
                self._stop.wait(self._rest_s)

    def _ask(self, client: Client) -> None:
        number = next(self._numbers)
        case, request_id = self._cases[number % len(self._cases)], f"{self._prefix}-{number}"
        stream = client.stream_generate(case.prompt, case.sampling, request_id=request_id)
        recorded = recorded_stream(
            self._history, stream, request_id=request_id, prompt=case.prompt, sampling=case.sampling
        )
        try:
            for delta in recorded:
                self.num_tokens += len(delta.token_ids)
            self.num_done += 1
        except Llama4Error:
            self.num_failed += 1  # recorded: the verdict says what it means
