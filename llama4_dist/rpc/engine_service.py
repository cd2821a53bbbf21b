"""Serves one engine to any number of gateways over the internal gRPC service; knows the engine port, not the engine.

Outputs go to the stream that submitted or attached their request. A stream that breaks leaves its requests running for
a while, so that they can be attached; one that says goodbye has them aborted. So no gateway can stall the engine or
another gateway, or hold KV blocks for long after it is gone.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from torch import Tensor

from llama4_dist.engine.port import Engine
from llama4_dist.errors import Llama4Error
from llama4_dist.internal.v1 import engine_pb2 as pb
from llama4_dist.internal.v1 import engine_pb2_grpc as pb_grpc
from llama4_dist.rpc import engine_wire as wire
from llama4_dist.rpc.cluster_token import GATEWAY_KEY, ClusterTokenInterceptor
from llama4_dist.rpc.command_desk import CommandDesk
from llama4_dist.rpc.request_ledger import RequestLedger
from llama4_dist.rpc.run_stream import RunStream

log = logging.getLogger(__name__)

MAX_STREAMS = 64  # gateways at once; each holds one pool thread
MAX_KEPT = 4096  # requests without a stream, running or ended
MAX_KEPT_TOKENS = 2 << 20  # and what they have said, log-probabilities included
HEARTBEAT_S = 0.1
SWEEP_S = 0.05
SCORE_CHUNK_BYTES = 1 << 20
MAX_COMMAND_BYTES = 64 << 20  # a ten-million-token prompt
WILDCARDS = frozenset({"", "0.0.0.0", "::", "[::]", "*"})  # noqa: S104 - refused, not bound

SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_COMMAND_BYTES),
    ("grpc.max_concurrent_streams", 2 * MAX_STREAMS),
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 5000),  # a gateway that vanished without a word holds its requests until this says so
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # identity only: inflation is not bounded by gRPC
)


class EngineServicer(pb_grpc.EngineServiceServicer):
    """Streams in, streams out; what a command may do is decided by the `CommandDesk`."""

    def __init__(self, engine: Engine, *, resume_ttl_s: float = 10.0) -> None:
        self._engine = engine
        ledger = RequestLedger(ttl_s=resume_ttl_s, max_kept=MAX_KEPT, max_weight=MAX_KEPT_TOKENS, clock=time.monotonic)
        self._desk = CommandDesk(engine, ledger)
        self._streams: dict[str, RunStream] = {}  # by the gateway's name for itself
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=arguments, name=name, daemon=True)
            for name, *arguments in (("heartbeat", self._beat, HEARTBEAT_S), ("sweeper", self._desk.sweep, SWEEP_S))
        ]
        engine.start(self._desk.deliver)
        for thread in self._threads:
            thread.start()

    def Run(self, request_iterator: Iterator[pb.RunRequest], context: grpc.ServicerContext) -> Iterator[pb.RunResponse]:
        """Serve one gateway until either side ends the stream."""
        stream = RunStream(context.cancel)
        if not context.add_callback(stream.end):
            return
        gateway = gateway_name(context)
        with self._lock:
            older = self._streams.get(gateway)
            self._streams[gateway] = stream
        if older is not None:  # the gateway has given it up, whatever the transport knows
            older.cut()
            self._desk.leave(older)
        stream.beat()
        threading.Thread(target=self._read, args=(stream, request_iterator), name="engine-read", daemon=True).start()
        try:
            yield from stream
        finally:
            stream.end()
            with self._lock:
                if self._streams.get(gateway) is stream:
                    del self._streams[gateway]
            self._desk.leave(stream)

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

    def close(self) -> None:
        """End the threads."""
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _read(self, stream: RunStream, commands: Iterator[pb.RunRequest]) -> None:
        try:
            for command in commands:
                if command.HasField("goodbye"):  # the mere end of the commands may also be a broken connection
                    stream.said_goodbye = True
                    return
                self._desk.obey(stream, command)
        except grpc.RpcError:
            log.info("gateway_stream_broken")
        finally:
            stream.end()

    def _beat(self) -> None:
        with self._lock:
            streams = tuple(self._streams.values())
        for stream in streams:
            stream.beat()

    def _repeat(self, act: Callable[[], None], interval_s: float) -> None:
        while not self._closed.wait(interval_s):
            try:
                act()
            except Exception:  # the next round must come, or every gateway takes this worker for lost
                log.exception("service_thread_failed name=%s", threading.current_thread().name)


def gateway_name(context: grpc.ServicerContext) -> str:
    """Return how a gateway names itself; one without a name is a gateway of its own."""
    names = [str(value) for key, value in context.invocation_metadata() if key == GATEWAY_KEY]
    return names[0] if names else uuid.uuid4().hex


def logit_chunks(logits_TV: Tensor) -> Iterator[bytes]:
    """Cut logits into the bytes of whole rows, at most `SCORE_CHUNK_BYTES` (but at least one row) at a time."""
    rows_per_chunk = max(1, SCORE_CHUNK_BYTES // (4 * logits_TV.shape[1]))
    for rows_PV in logits_TV.float().cpu().split(rows_per_chunk):
        yield rows_PV.contiguous().numpy().astype("<f4", copy=False).tobytes()


class EngineServer:
    """The gRPC server around an `EngineServicer`; listens from construction until `close`.

    `resume_ttl_s` is how long a request whose gateway broke off goes on and may be attached; 0 aborts it at once.
    """

    def __init__(self, engine: Engine, *, host: str, secret: bytes, port: int = 0, resume_ttl_s: float = 10.0) -> None:
        if host in WILDCARDS:
            raise ValueError(f"{host=} would listen on every interface: name the node's address or a loopback one")
        # Every Run holds a thread; the rest is for the unary calls.
        self._pool = ThreadPoolExecutor(MAX_STREAMS + 8, thread_name_prefix="engine-rpc")
        self._server = grpc.server(self._pool, interceptors=[ClusterTokenInterceptor(secret)], options=SERVER_OPTIONS)
        self._servicer = EngineServicer(engine, resume_ttl_s=resume_ttl_s)
        pb_grpc.add_EngineServiceServicer_to_server(self._servicer, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(f"{host}:{port}")
        self.address = f"{host}:{self.port}"
        self._server.start()
        log.info("engine_service_listening address=%s", self.address)

    def close(self, grace_s: float = 0.5) -> None:
        """End all streams and stop listening; the engine is its owner's to close."""
        self._server.stop(grace_s).wait()
        self._servicer.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
