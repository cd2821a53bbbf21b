"""Tells gateways of other processes where the engines are; knows neither engines nor who starts them."""

import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import grpc

from llama4_dist.internal.v1 import directory_pb2 as pb
from llama4_dist.internal.v1 import directory_pb2_grpc as pb_grpc
from llama4_dist.rpc.cluster_token import ClusterTokenInterceptor
from llama4_dist.rpc.engine_service import SERVER_OPTIONS, WILDCARDS

log = logging.getLogger(__name__)

MAX_WATCHERS = 256  # gateways; each holds one pool thread
HEARTBEAT_S = 5.0  # the same answer again, so that both sides notice a dead connection


class DirectoryServicer(pb_grpc.DirectoryServiceServicer):
    """Holds the engines of now; every watcher gets each change."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._engines: Mapping[str, str] = {}
        self._revision = 0
        self._closed = False

    def set(self, engines: Mapping[str, str]) -> None:
        """Tell everybody."""
        with self._changed:
            self._engines, self._revision = dict(engines), self._revision + 1
            self._changed.notify_all()

    def close(self) -> None:
        """End every stream."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def WatchEngines(
        self, request: pb.WatchEnginesRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchEnginesResponse]:
        """Answer with the engines, and again when they change."""
        seen = -1
        while context.is_active():
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._revision != seen, HEARTBEAT_S)  # noqa: B023
                if self._closed:
                    return
                seen, engines = self._revision, self._engines
            yield pb.WatchEnginesResponse(engines=engines)


class DirectoryServer:
    """The gRPC server around a `DirectoryServicer`; listens from construction until `close`."""

    def __init__(self, *, host: str, secret: bytes, port: int = 0) -> None:
        if host in WILDCARDS:
            raise ValueError(f"{host=} would listen on every interface: name the node's address or a loopback one")
        self._servicer = DirectoryServicer()
        self._pool = ThreadPoolExecutor(MAX_WATCHERS, thread_name_prefix="directory")
        self._server = grpc.server(self._pool, interceptors=[ClusterTokenInterceptor(secret)], options=SERVER_OPTIONS)
        pb_grpc.add_DirectoryServiceServicer_to_server(self._servicer, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(f"{host}:{port}")
        self.address = f"{host}:{self.port}"
        self._server.start()
        log.info("directory_listening address=%s", self.address)

    def set(self, engines: Mapping[str, str]) -> None:
        """Tell every gateway where the engines are now."""
        self._servicer.set(engines)

    def close(self, grace_s: float = 0.5) -> None:
        """End all streams and stop listening."""
        self._servicer.close()
        self._server.stop(grace_s).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)
