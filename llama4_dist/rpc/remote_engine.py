"""An engine in another process, spoken to over the internal gRPC service; satisfies the engine port.

`submit` does not wait for the worker: a refusal (queue full, duplicate) comes back as an output with an error. A worker
that breaks off or falls silent ends every running request with `UnavailableError`; the requests may then go on with
another engine. The worker is connected to again for as long as this engine is open.
"""

import logging
import threading
import uuid
from collections import deque
from collections.abc import Sequence

import grpc
import torch
from torch import Tensor

from llama4_dist.engine.port import EngineStats, OnOutputs, is_last
from llama4_dist.errors import DuplicateRequestError, EngineError, UnauthenticatedError, UnavailableError
from llama4_dist.internal.v1 import engine_pb2 as pb
from llama4_dist.internal.v1 import engine_pb2_grpc as pb_grpc
from llama4_dist.request import EngineLimits, EngineRequest, TokenOutput
from llama4_dist.rpc import engine_wire as wire
from llama4_dist.rpc.cluster_token import GATEWAY_KEY, token_metadata
from llama4_dist.rpc.run_call import RunCall
from llama4_dist.rpc.status import from_rpc_error

log = logging.getLogger(__name__)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    # TCP cannot see a stopped process; an unanswered ping can, also before the first heartbeat.
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),  # a cluster address is never behind the proxy of the environment
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # also bounds one attempt to connect
    ("grpc.max_reconnect_backoff_ms", 1000),
)
STATS_TIMEOUT_S = 5.0
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.02, 0.5
GOODBYE_S = 1.0  # for the worker to end the stream, so that it aborts at once what still runs
MAX_ABORTS = 4096  # remembered for a worker that is away; it lets orphans expire anyway


class RemoteEngine:
    """The engine port over one attention worker's service.

    Every stream to the worker is a generation: once it is given up, nothing more of it is passed on, whatever a worker
    that was stopped says when it wakes up.
    """

    def __init__(self, address: str, *, secret: bytes, timeout_s: float = 30.0, silence_timeout_s: float = 1.0) -> None:
        self.address = address
        self._metadata = (*token_metadata(secret), (GATEWAY_KEY, uuid.uuid4().hex))
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.EngineServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._timeout_s = timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._running: set[str] = set()
        self._aborts: deque[str] = deque(maxlen=MAX_ABORTS)
        self._lock = threading.Lock()
        self._delivering = threading.Lock()  # from the check of the generation to the end of the delivery
        self._down = "it has not been started"
        self._closing = threading.Event()
        self._keeper: threading.Thread | None = None
        self._call: RunCall | None = None
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
        """Open the stream; `on_outputs` is called once per step, and never by two threads at once."""
        if self._keeper is not None:
            raise ValueError("this engine was started before: make a new RemoteEngine")
        self._on_outputs = on_outputs
        self._down = ""
        call = self._open()
        self._keeper = threading.Thread(target=self._keep, args=(call,), name=f"engine-{self.address}", daemon=True)
        self._keeper.start()

    def submit(self, request: EngineRequest) -> None:
        """Send a request on its way."""
        self._begin(request.request_id, pb.RunRequest(submit=wire.request_to_wire(request)))

    def attach(self, request: EngineRequest) -> None:
        """Ask for a request whose gateway broke off."""
        command = pb.AttachCommand(request_id=request.request_id, digest=request.digest)
        self._begin(request.request_id, pb.RunRequest(attach=command))

    def abort(self, request_id: str) -> None:
        """Ask for the end of a request; its CANCELLED output follows. One that was lost here ends without a word."""
        with self._lock:
            if self._down or self._call is None:
                self._aborts.append(request_id)
            else:
                self._call.send(pb.RunRequest(abort=pb.AbortCommand(request_id=request_id)))

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
        if self._keeper is not None and self._down:
            raise self._unreachable()
        timeout_s = min(self._timeout_s, STATS_TIMEOUT_S)
        try:
            reply = self._stub.GetStats(pb.GetStatsRequest(), metadata=self._metadata, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._translated(error) from None
        return wire.stats_from_wire(reply)

    def close(self) -> None:
        """End the stream and the channel; running requests end with `UnavailableError`. Harmless twice."""
        self._closing.set()
        with self._lock:
            call, down = self._call, bool(self._down)
        if call is not None:
            call.finish(0.0 if down else GOODBYE_S)
        if self._keeper is not None and self._keeper is not threading.current_thread():
            self._keeper.join(self._timeout_s)
        self._channel.close()

    def _begin(self, request_id: str, command: pb.RunRequest) -> None:
        with self._lock:
            if self._down or self._call is None:
                raise self._unreachable()
            if request_id in self._running:
                raise DuplicateRequestError(f"a request with id {request_id!r} is running: choose another id")
            self._running.add(request_id)
            self._call.send(command)

    def _open(self) -> RunCall:
        call = RunCall(self._stub, self._metadata, self._hear)
        with self._lock:
            self._call = call
        call.start()
        return call

    def _keep(self, call: RunCall) -> None:
        """Watch the stream, give it up when it is lost, and open the next one, until `close`."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            reason = call.watch(silence_timeout_s=self._silence_timeout_s, first_timeout_s=self._timeout_s)
            if call.num_heard:
                backoff_s = FIRST_BACKOFF_S
            self._lose(call, "it was closed" if self._closing.is_set() else reason)
            if self._closing.wait(backoff_s):
                return
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            call = self._open()
            if self._closing.is_set():
                call.cut()

    def _hear(self, call: RunCall, response: pb.RunResponse) -> None:
        """Pass a message on, unless its stream was given up."""
        outputs = [wire.output_from_wire(output) for output in response.outputs]
        with self._delivering:
            with self._lock:
                if call is not self._call:
                    return
                self._connected(call)
                self._running -= {output.request_id for output in outputs if is_last(output)}
            if outputs:
                self._on_outputs(outputs)

    def _connected(self, call: RunCall) -> None:
        """Take the worker for up from its first message on."""
        if self._down:
            log.info("engine_reconnected address=%s", self.address)
            self._down = ""
        while self._aborts:
            call.send(pb.RunRequest(abort=pb.AbortCommand(request_id=self._aborts.popleft())))

    def _lose(self, call: RunCall, reason: str) -> None:
        """Give the stream up and end every running request; until the next stream speaks `submit` refuses."""
        with self._delivering:
            with self._lock:
                self._call = None
                was_up, self._down = not self._down, reason
                lost, self._running = sorted(self._running), set()
            call.cut()
            if was_up:
                log.info("engine_stream_ended address=%s lost=%d reason=%s", self.address, len(lost), reason)
            if lost:
                error = UnavailableError(
                    "the attention worker was lost while it generated: retry the request", reason="WORKER_LOST"
                )
                self._on_outputs([TokenOutput(request_id=request_id, error=error) for request_id in lost])

    def _unreachable(self) -> UnavailableError:
        return UnavailableError(f"the attention worker cannot be reached: {self._down}")

    def _translated(self, error: grpc.RpcError) -> UnavailableError | UnauthenticatedError:
        cause = from_rpc_error(error)
        if isinstance(cause, UnauthenticatedError):
            return UnauthenticatedError("the attention worker belongs to another cluster: its secret differs")
        log.warning("engine_call_failed address=%s cause=%s details=%s", self.address, type(cause).__name__, cause)
        return UnavailableError("the attention worker did not answer: it is down, or not yet up")
