"""The attention workers at addresses that change, as one engine; knows neither who starts them nor who says where."""

import logging
import threading
from collections.abc import Mapping

from llama4_dist.engine.group import EngineGroup
from llama4_dist.errors import Llama4Error
from llama4_dist.rpc.remote_engine import RemoteEngine

log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 5.0  # for a worker that serves already to say what it takes


class RemoteGroup:
    """An `EngineGroup` whose members follow a mapping of worker id to address. `group` is the engine."""

    def __init__(self, addresses: Mapping[str, str], *, secret: bytes, replay_timeout_s: float = 30.0) -> None:
        self._secret = secret
        self._lock = threading.Lock()
        self._closed = False
        self._known: dict[str, str] = {}  # worker id, which is the group's name for the engine, to address
        engines: dict[str, RemoteEngine] = {}
        try:
            for worker, address in addresses.items():
                engines[worker] = RemoteEngine(address, secret=secret)
            self.group = EngineGroup(list(engines.values()), names=list(engines), replay_timeout_s=replay_timeout_s)
        except BaseException:
            for engine in engines.values():
                engine.close()
            raise
        self._known |= addresses

    def follow(self, addresses: Mapping[str, str]) -> bool:
        """Let those go that are gone or elsewhere now, and let new ones serve; return whether all could be reached."""
        with self._lock:
            if self._closed:
                return True
            for worker, address in tuple(self._known.items()):
                if addresses.get(worker) != address:
                    del self._known[worker]
                    self.group.remove(worker)
            joined = [self._join(worker, address) for worker, address in addresses.items()]
            return all(joined)

    def close(self) -> None:
        """Close every engine."""
        with self._lock:
            self._closed = True
        self.group.close()

    def _join(self, worker: str, address: str) -> bool:
        if worker in self._known:
            return True
        try:
            engine = RemoteEngine(address, secret=self._secret, timeout_s=JOIN_TIMEOUT_S)
        except Llama4Error as error:
            log.warning("engine_unreachable worker=%s reason=%s", worker, error.reason)
            return False
        self.group.add(engine, name=worker)
        self._known[worker] = address
        return True
