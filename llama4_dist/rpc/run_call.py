"""The client's end of one stream to an attention worker: commands go in, messages come out; knows no request."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

import grpc

from llama4_dist.internal.v1 import engine_pb2 as pb
from llama4_dist.internal.v1 import engine_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

LOOKS_PER_TIMEOUT = 5


class RunCall:
    """One call of `Run`, read in a thread of its own; `on_message` is given this call with each message."""

    def __init__(
        self,
        stub: pb_grpc.EngineServiceStub,
        metadata: Sequence[tuple[str, str]],
        on_message: Callable[["RunCall", pb.RunResponse], None],
    ) -> None:
        self.num_heard = 0
        self._commands: queue.SimpleQueue[pb.RunRequest | None] = queue.SimpleQueue()
        self._on_message = on_message
        self._ended = threading.Event()
        self._reason = "it ended the stream"
        self._call = stub.Run(iter(self._commands.get, None), metadata=metadata)
        self._reader = threading.Thread(target=self._read, name="engine-read", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._reader.start()

    def send(self, command: pb.RunRequest) -> None:
        """Queue a command."""
        self._commands.put(command)

    def watch(self, *, silence_timeout_s: float, first_timeout_s: float) -> str:
        """Return why the call is lost, once it is: it ended, or nothing came for that long.

        Only time in which this thread runs counts: what came while this process stood still has not been read yet.
        """
        look_s = silence_timeout_s / LOOKS_PER_TIMEOUT
        silent_s, num_heard, looked_s = 0.0, 0, time.monotonic()
        while not self._ended.wait(look_s):
            now_s = time.monotonic()
            if self.num_heard != num_heard:
                silent_s, num_heard = 0.0, self.num_heard
            else:
                silent_s += min(now_s - looked_s, 2 * look_s)
            looked_s = now_s
            limit_s = silence_timeout_s if num_heard else first_timeout_s
            if silent_s >= limit_s:
                return f"it has been silent for {limit_s:g} s"
        return self._reason

    def finish(self, timeout_s: float) -> None:
        """Say goodbye and give the worker that long to end the stream."""
        self._commands.put(pb.RunRequest(goodbye=pb.GoodbyeCommand()))
        self._commands.put(None)
        if not self._ended.wait(timeout_s):
            self.cut()

    def cut(self) -> None:
        """Break the call off, which is no goodbye."""
        self._call.cancel()
        self._commands.put(None)

    def _read(self) -> None:
        try:
            for message in self._call:
                self.num_heard += 1
                self._on_message(self, message)
        except grpc.RpcError as error:
            log.debug("run_call_ended code=%s details=%s", error.code(), error.details())
            self._reason = f"the call ended with {error.code().name}"
        finally:
            self._ended.set()
