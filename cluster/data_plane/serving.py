"""The gRPC service of a worker's engine, from before there is an engine to the end of both."""

import threading
from collections.abc import Callable
from typing import TypeVar

from cluster.worker import Location, WorkerConfig, url_host
from llama4_dist.engine.local import LocalEngine
from llama4_dist.rpc.engine_service import EngineServer

T = TypeVar("T")


class Serving:
    """`serve` starts the engine's thread; `between_steps` is right before and after."""

    def __init__(self, config: WorkerConfig, location: Location) -> None:
        self._config = config
        self._location = location
        self._starting = threading.Lock()
        self._service: EngineServer | None = None
        self._engine: LocalEngine | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the engine is served."""
        return (self._service.address,) if self._service is not None else ()

    def serve(self, engine: LocalEngine) -> str:
        """Start the engine and its service; return the service's address."""
        with self._starting:
            service = EngineServer(
                engine,
                host=url_host(self._location.address),
                secret=self._config.secret,
                resume_ttl_s=self._config.resume_ttl_s,
            )
            self._service, self._engine = service, engine
        return service.address

    def between_steps(self, action: Callable[[], T]) -> T:
        """Run an action while no step runs."""
        with self._starting:
            engine = self._engine
            if engine is None:  # the engine's thread does not run yet
                return action()
        return engine.between_steps(action)

    def close(self) -> None:
        """Stop the service."""
        if self._service is not None:
            self._service.close()
