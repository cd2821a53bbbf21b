"""One gateway's stream at an attention worker: messages on their way out; knows no request."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from llama4_dist.internal.v1 import engine_pb2 as pb
from llama4_dist.request import TokenOutput
from llama4_dist.rpc import engine_wire as wire

log = logging.getLogger(__name__)

MAX_PENDING_STEPS = 4096  # step messages a gateway may leave unread before it is dropped


class RunStream:
    """Step messages and heartbeats, in order. `said_goodbye` tells a gateway that ended from one that broke off."""

    def __init__(self, cancel: Callable[[], object]) -> None:
        self._cancel = cancel
        self.responses: queue.Queue[pb.RunResponse | None] = queue.Queue(maxsize=MAX_PENDING_STEPS)
        self.ended = threading.Event()
        self.said_goodbye = False

    def send(self, outputs: Sequence[TokenOutput]) -> None:
        """Queue one message; a full queue ends the stream."""
        if self.ended.is_set():
            return
        try:
            self.responses.put_nowait(wire.outputs_to_wire(outputs))
        except queue.Full:
            log.warning("gateway_too_slow pending=%d", MAX_PENDING_STEPS)
            self.cut()

    def beat(self) -> None:
        """Say that this worker runs, unless something waits to be sent anyway."""
        if self.responses.empty():
            self.send(())

    def cut(self) -> None:
        """End the stream also where its reader does not read."""
        self.end()
        self._cancel()  # wakes a sender that flow control holds

    def end(self) -> None:
        """Wake the sender and let it return."""
        self.ended.set()
        try:
            self.responses.put_nowait(None)
        except queue.Full:
            return  # the sender has messages to wake up for, and will see `ended`

    def __iter__(self) -> Iterator[pb.RunResponse]:
        while not self.ended.is_set():
            response = self.responses.get()
            if response is None:
                return
            yield response
