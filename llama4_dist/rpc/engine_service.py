"""Serves one engine to any number of gateways over the internal gRPC service; knows the engine port, not the engine.

Outputs go to the stream that submitted their request. A stream that breaks, or whose reader falls too far behind, has
its requests aborted, so no gateway can stall the engine, another gateway, or hold KV blocks after it is gone.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
from torch import Tensor

from llama4_dist.engine.port import Engine
from llama4_dist.errors import DuplicateRequestError, Llama4Error
from llama4_dist.internal.v1 import engine_pb2 as pb
from llama4_dist.internal.v1 import engine_pb2_grpc as pb_grpc
from llama4_dist.request import TokenOutput
from llama4_dist.rpc import engine_wire as wire
from llama4_dist.rpc.cluster_token import ClusterTokenInterceptor

log = logging.getLogger(__name__)

MAX_STREAMS = 64  # gateways at once; each holds one pool thread
MAX_PENDING_STEPS = 4096  # step messages a gateway may leave unread before it is dropped
SCORE_CHUNK_BYTES = 1 << 20
MAX_COMMAND_BYTES = 64 << 20  # a ten-million-token prompt
WILDCARDS = frozenset({"", "0.0.0.0", "::", "[::]", "*"})  # noqa: S104 - refused, not bound

SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_COMMAND_BYTES),
    ("grpc.max_concurrent_streams", 2 * MAX_STREAMS),
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # identity only: inflation is not bounded by gRPC
)


class Stream:
    """One gateway's stream: its step messages on their way out."""

    def __init__(self, cancel: Callable[[], object]) -> None:
        self._cancel = cancel
        self.responses: queue.Queue[pb.RunResponse | None] = queue.Queue(maxsize=MAX_PENDING_STEPS)
        self.ended = threading.Event()

    def send(self, outputs: Sequence[TokenOutput]) -> None:
        """Queue one message; a full queue ends the stream."""
        try:
            self.responses.put_nowait(wire.outputs_to_wire(outputs))
        except queue.Full:
            log.warning("gateway_too_slow pending=%d", MAX_PENDING_STEPS)
            self.ended.set()
            self._cancel()  # wakes a sender that flow control holds

    def __iter__(self) -> Iterator[pb.RunResponse]:
        while not self.ended.is_set():
            response = self.responses.get()
            if response is None:
                return
            yield response

    def end(self) -> None:
        """Wake the sender and let it return."""
        self.ended.set()
        try:
            self.responses.put_nowait(None)
        except queue.Full:
            return  # the sender has messages to wake up for, and will see `ended`


class EngineServicer(pb_grpc.EngineServiceServicer):
    """Routes commands to the engine and outputs to the streams that asked for them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._owners: dict[str, Stream] = {}
        self._lock = threading.Lock()
        engine.start(self._on_outputs)

    def Run(self, request_iterator: Iterator[pb.RunRequest], context: grpc.ServicerContext) -> Iterator[pb.RunResponse]:
        """Serve one gateway until either side ends the stream."""
        stream = Stream(context.cancel)
        if not context.add_callback(stream.end):
            return
        threading.Thread(target=self._read, args=(stream, request_iterator), daemon=True).start()
        try:
            yield from stream
        finally:
            stream.end()
            self._abort_all(stream)

    def Score(self, request: pb.ScoreRequest, context: grpc.ServicerContext) -> Iterator[pb.ScoreResponse]:
        """Score one prompt."""
        chunk_size = request.chunk_size if request.HasField("chunk_size") else None
        try:
            logits_TV = self._engine.score(tuple(request.token_ids), chunk_size=chunk_size)
        except Llama4Error as error:
            yield pb.ScoreResponse(error=wire.error_to_wire(error))
            return
        for chunk in logit_chunks(logits_TV):
            yield pb.ScoreResponse(logits=chunk)

    def GetStats(self, request: pb.GetStatsRequest, context: grpc.ServicerContext) -> pb.GetStatsResponse:
        """Return the counters."""
        return wire.stats_to_wire(self._engine.stats())

    def GetLimits(self, request: pb.GetLimitsRequest, context: grpc.ServicerContext) -> pb.GetLimitsResponse:
        """Return the limits."""
        return wire.limits_to_wire(self._engine.limits)

    def _read(self, stream: Stream, commands: Iterator[pb.RunRequest]) -> None:
        try:
            for command in commands:
                if command.HasField("submit"):
                    self._submit(stream, command.submit)
                elif command.HasField("abort"):
                    self._abort(stream, command.abort.request_id)
        except grpc.RpcError:
            log.info("gateway_stream_broken")
        finally:
            stream.end()

    def _submit(self, stream: Stream, command: pb.SubmitCommand) -> None:
        request_id = command.request_id
        with self._lock:
            taken = request_id in self._owners
            if not taken:
                self._owners[request_id] = stream  # before submit: the first output may come at once
        try:
            if taken:
                raise DuplicateRequestError(f"a request with id {request_id!r} is running: choose another id")
            self._engine.submit(wire.request_from_wire(command))
        except Llama4Error as error:
            if not taken:
                self._disown(request_id)
            stream.send([TokenOutput(request_id=request_id, error=error)])

    def _abort(self, stream: Stream, request_id: str) -> None:
        with self._lock:
            owned = self._owners.get(request_id) is stream
        if owned:  # a gateway cannot end what another one started
            self._engine.abort(request_id)

    def _abort_all(self, stream: Stream) -> None:
        with self._lock:
            orphans = [request_id for request_id, owner in self._owners.items() if owner is stream]
        for request_id in orphans:
            self._engine.abort(request_id)

    def _disown(self, request_id: str) -> None:
        with self._lock:
            self._owners.pop(request_id, None)

    def _on_outputs(self, outputs: Sequence[TokenOutput]) -> None:
        """Split one step's outputs by stream; runs on the engine's thread, so it never waits."""
        by_stream: dict[Stream, list[TokenOutput]] = {}
        with self._lock:
            for output in outputs:
                if (owner := self._owners.get(output.request_id)) is None:
                    continue
                by_stream.setdefault(owner, []).append(output)
                if output.finish_reason is not None or output.error is not None:
                    del self._owners[output.request_id]
        for stream, mine in by_stream.items():
            if not stream.ended.is_set():
                stream.send(mine)


def logit_chunks(logits_TV: Tensor) -> Iterator[bytes]:
    """Cut logits into the bytes of whole rows, at most `SCORE_CHUNK_BYTES` (but at least one row) at a time."""
    rows_per_chunk = max(1, SCORE_CHUNK_BYTES // (4 * logits_TV.shape[1]))
    for rows_PV in logits_TV.float().cpu().split(rows_per_chunk):  # type: ignore[no-untyped-call]
        yield rows_PV.contiguous().numpy().astype("<f4", copy=False).tobytes()


class EngineServer:
    """The gRPC server around an `EngineServicer`; listens from construction until `close`."""

    def __init__(self, engine: Engine, *, host: str, secret: bytes, port: int = 0) -> None:
        if host in WILDCARDS:
            raise ValueError(f"{host=} would listen on every interface: name the node's address or a loopback one")
        # Every Run holds a thread; the rest is for the unary calls.
        self._pool = ThreadPoolExecutor(MAX_STREAMS + 8, thread_name_prefix="engine-rpc")
        self._server = grpc.server(self._pool, interceptors=[ClusterTokenInterceptor(secret)], options=SERVER_OPTIONS)
        servicer = EngineServicer(engine)
        pb_grpc.add_EngineServiceServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(f"{host}:{port}")
        self.address = f"{host}:{self.port}"
        self._server.start()
        log.info("engine_service_listening address=%s", self.address)

    def close(self, grace_s: float = 0.5) -> None:
        """End all streams and stop listening; the engine is its owner's to close."""
        self._server.stop(grace_s).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)
