"""The engine of a gateway in a process of its own: the attention workers that a cluster's directory names.

The directory is asked once at the start and listened to from then on; while it is away the workers last named serve on.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from torch import Tensor

from llama4_dist.engine.port import EngineStats, OnOutputs
from llama4_dist.errors import UnavailableError
from llama4_dist.internal.v1 import directory_pb2 as pb
from llama4_dist.internal.v1 import directory_pb2_grpc as pb_grpc
from llama4_dist.request import EngineLimits, EngineRequest
from llama4_dist.rpc.cluster_token import token_metadata
from llama4_dist.rpc.remote_engine import CHANNEL_OPTIONS
from llama4_dist.rpc.remote_group import RemoteGroup
from llama4_dist.rpc.status import from_rpc_error

log = logging.getLogger(__name__)

RETRY_S = 0.5


class DirectoryEngine:
    """An `Engine`. The constructor returns when the directory has named at least one worker that answers."""

    def __init__(self, address: str, *, secret: bytes, timeout_s: float = 60.0, replay_timeout_s: float = 30.0) -> None:
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.DirectoryServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = token_metadata(secret)
        self._closing = threading.Event()
        self._call: Any = None
        self._wanted: Mapping[str, str] = {}
        self._changed = threading.Event()
        try:
            self._remote = RemoteGroup(self._first_answer(timeout_s), secret=secret, replay_timeout_s=replay_timeout_s)
        except BaseException:
            self._channel.close()
            raise
        self._listener = threading.Thread(target=self._listen, name="directory", daemon=True)
        self._follower = threading.Thread(target=self._follow, name="directory-follow", daemon=True)
        self._listener.start()
        self._follower.start()

    @property
    def limits(self) -> EngineLimits:
        """What the smallest attention worker takes."""
        return self._remote.group.limits

    def start(self, on_outputs: OnOutputs) -> None:
        """Open the streams to the attention workers."""
        self._remote.group.start(on_outputs)

    def submit(self, request: EngineRequest) -> None:
        """Give a request to the least loaded attention worker."""
        self._remote.group.submit(request)

    def attach(self, request: EngineRequest) -> None:
        """Take over a request whose gateway is gone."""
        self._remote.group.attach(request)

    def abort(self, request_id: str) -> None:
        """Cancel a request."""
        self._remote.group.abort(request_id)

    def score(self, token_ids: Sequence[int], *, chunk_size: int | None = None) -> Tensor:
        """Return float32 logits_TV of every position."""
        return self._remote.group.score(token_ids, chunk_size=chunk_size)

    def stats(self) -> EngineStats:
        """Return the sum over the attention workers."""
        return self._remote.group.stats()

    def stats_by_worker(self) -> Mapping[str, EngineStats | None]:
        """Return each attention worker's counters; None for one that does not answer."""
        return self._remote.group.stats_by_worker()

    def replays(self) -> Mapping[str, int]:
        """Return how many requests went on elsewhere, by the attention worker that was lost."""
        return self._remote.group.replays()

    def close(self) -> None:
        """Stop listening and close the streams; the workers serve on for other gateways."""
        self._closing.set()
        self._changed.set()
        if self._call is not None:
            self._call.cancel()
        self._listener.join()
        self._follower.join()
        self._remote.close()
        self._channel.close()

    def _first_answer(self, timeout_s: float) -> Mapping[str, str]:
        call = self._stub.WatchEngines(
            pb.WatchEnginesRequest(), metadata=self._metadata, timeout=timeout_s, wait_for_ready=True
        )
        try:
            for answer in call:
                if answer.engines:
                    return dict(answer.engines)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise UnavailableError(
                    f"the directory named no attention worker in {timeout_s:g} s: is the cluster there, and loaded? "
                    "directory_timeout_s says how long a gateway waits"
                ) from None
            raise from_rpc_error(error) from None
        finally:
            call.cancel()
        raise UnavailableError("the directory ended before it named an attention worker")

    def _listen(self) -> None:
        """Note every answer; ask again when the stream ends."""
        while not self._closing.is_set():
            self._call = self._stub.WatchEngines(pb.WatchEnginesRequest(), metadata=self._metadata, wait_for_ready=True)
            try:
                for answer in self._call:
                    if dict(answer.engines) != self._wanted:
                        self._wanted = dict(answer.engines)
                        self._changed.set()
            except grpc.RpcError as error:
                if not self._closing.is_set():
                    log.warning("directory_away cause=%s", from_rpc_error(error))
            self._closing.wait(RETRY_S)

    def _follow(self) -> None:
        """Bring the group up to what was named last; a worker that does not answer is tried again."""
        retry_s: float | None = None
        while not self._closing.is_set():
            self._changed.wait(retry_s)
            self._changed.clear()
            if self._wanted and not self._closing.is_set():
                retry_s = None if self._remote.follow(self._wanted) else RETRY_S
