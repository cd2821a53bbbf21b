"""An engine in another process, spoken to over the internal gRPC service; satisfies the engine port.

`submit` does not wait for the worker: a refusal (queue full, duplicate) comes back as an output with an error. A lost
connection ends every running request with `UnavailableError`; the requests may then be replayed on another engine.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import grpc
import torch
from torch import Tensor

from llama4_dist.engine.port import EngineStats
from llama4_dist.errors import DuplicateRequestError, EngineError, UnauthenticatedError, UnavailableError
from llama4_dist.internal.v1 import engine_pb2 as pb
from llama4_dist.internal.v1 import engine_pb2_grpc as pb_grpc
from llama4_dist.request import EngineLimits, EngineRequest, TokenOutput
from llama4_dist.rpc import engine_wire as wire
from llama4_dist.rpc.cluster_token import token_metadata
from llama4_dist.rpc.status import from_rpc_error

log = logging.getLogger(__name__)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    # TCP cannot see a stopped process; an unanswered ping can.
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),  # a cluster address is never behind the proxy of the environment
)

OnOutputs = Callable[[Sequence[TokenOutput]], None]


class RemoteEngine:
    """The engine port over one attention worker's service."""

    def __init__(self, address: str, *, secret: bytes, timeout_s: float = 30.0) -> None:
        self.address = address
        self._metadata = token_metadata(secret)
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.EngineServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._timeout_s = timeout_s
        self._commands: queue.SimpleQueue[pb.RunRequest | None] = queue.SimpleQueue()
        self._running: set[str] = set()
        self._lock = threading.Lock()
        self._down = "it has not been started"
        self._closing = False
        self._reader: threading.Thread | None = None
        self._call: grpc.Call | None = None
        self._on_outputs: OnOutputs = lambda _outputs: None
        try:
            reply = self._stub.GetLimits(
                pb.GetLimitsRequest(), metadata=self._metadata, timeout=timeout_s, wait_for_ready=True
            )
        except grpc.RpcError as error:
            self._channel.close()
            raise self._translated(error) from None
        self.limits: EngineLimits = wire.limits_from_wire(reply)

    def start(self, on_outputs: OnOutputs) -> None:
        """Open the stream; `on_outputs` is called from the reader thread, once per step."""
        if self._reader is not None:
            raise ValueError("this engine was started before: make a new RemoteEngine")
        self._on_outputs = on_outputs
        call = self._stub.Run(self._next_commands(), metadata=self._metadata)
        self._call = call
        self._down = ""
        self._reader = threading.Thread(target=self._read, args=(call,), name=f"engine-{self.address}", daemon=True)
        self._reader.start()

    def submit(self, request: EngineRequest) -> None:
        """Send a request on its way."""
        with self._lock:
            if self._down:
                raise UnavailableError(f"the attention worker cannot be reached: {self._down}")
            if request.request_id in self._running:
                raise DuplicateRequestError(f"a request with id {request.request_id!r} is running: choose another id")
            self._running.add(request.request_id)
            self._commands.put(pb.RunRequest(submit=wire.request_to_wire(request)))

    def abort(self, request_id: str) -> None:
        """Ask for the end of a request; its CANCELLED output follows."""
        with self._lock:
            if request_id in self._running and not self._down:
                self._commands.put(pb.RunRequest(abort=pb.AbortCommand(request_id=request_id)))

    def score(self, token_ids: Sequence[int], *, chunk_size: int | None = None) -> Tensor:
        """Return float32 logits_TV of every position."""
        request = pb.ScoreRequest(token_ids=token_ids, chunk_size=chunk_size)
        logits_TV = torch.empty(len(token_ids), self.limits.vocab_size, dtype=torch.float32)
        flat, filled = logits_TV.view(-1), 0
        try:
            for reply in self._stub.Score(request, metadata=self._metadata):
                if reply.HasField("error"):
                    raise wire.error_from_wire(reply.error)
                chunk = torch.frombuffer(bytearray(reply.logits), dtype=torch.float32)
                if filled + len(chunk) > len(flat):
                    raise EngineError("the attention worker sent more logits than the prompt has positions")
                flat[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
        except grpc.RpcError as error:
            raise self._translated(error) from None
        if filled != len(flat):
            raise EngineError("the attention worker sent fewer logits than the prompt has positions")
        return logits_TV

    def stats(self) -> EngineStats:
        """Fetch the counters."""
        try:
            reply = self._stub.GetStats(pb.GetStatsRequest(), metadata=self._metadata, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._translated(error) from None
        return wire.stats_from_wire(reply)

    def close(self) -> None:
        """End the stream and the channel; running requests end with `UnavailableError`."""
        self._closing = True
        self._commands.put(None)
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(self._timeout_s)
        self._channel.close()

    def _next_commands(self) -> Iterator[pb.RunRequest]:
        while (command := self._commands.get()) is not None:
            yield command

    def _read(self, call: Iterator[pb.RunResponse]) -> None:
        reason = "it ended the stream"
        try:
            for response in call:
                self._deliver([wire.output_from_wire(output) for output in response.outputs])
        except grpc.RpcError as error:
            reason = "it was closed" if self._closing else self._translated(error).message
        finally:
            self._lose(reason)

    def _deliver(self, outputs: Sequence[TokenOutput]) -> None:
        with self._lock:
            for output in outputs:
                if output.finish_reason is not None or output.error is not None:
                    self._running.discard(output.request_id)
        self._on_outputs(outputs)

    def _lose(self, reason: str) -> None:
        """End every running request; after this `submit` refuses."""
        with self._lock:
            self._down = reason
            lost, self._running = sorted(self._running), set()
        self._commands.put(None)
        log.info("engine_stream_ended address=%s lost=%d", self.address, len(lost))
        if lost:
            error = UnavailableError(
                "the attention worker was lost while it generated: retry the request", reason="WORKER_LOST"
            )
            self._on_outputs([TokenOutput(request_id=request_id, error=error) for request_id in lost])

    def _translated(self, error: grpc.RpcError) -> UnavailableError | UnauthenticatedError:
        cause = from_rpc_error(error)
        if isinstance(cause, UnauthenticatedError):
            return UnauthenticatedError("the attention worker belongs to another cluster: its secret differs")
        log.warning("engine_call_failed address=%s cause=%s details=%s", self.address, type(cause).__name__, cause)
        return UnavailableError("the attention worker did not answer: it is down, or not yet up")
