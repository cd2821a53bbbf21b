"""What the driver has to know of a controller's standing decisions: processes to start and end, engines to use."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.worker import Role

CONTROLLER = "controller"  # its worker id


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """Workers to start and to end, and where the attention workers that serve listen, by worker id."""

    start: Mapping[str, Role]
    end: tuple[str, ...]
    engines: Mapping[str, str]


class Engines:
    """Addresses of attention workers that serve; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._addresses: dict[str, str] = {}

    @property
    def all(self) -> Mapping[str, str]:
        with self._lock:
            return dict(self._addresses)

    def set(self, addresses: Mapping[str, str]) -> None:
        """Add these, or let them replace what is known."""
        with self._lock:
            self._addresses |= addresses

    def remove(self, worker: str) -> None:
        """Forget a worker."""
        with self._lock:
            self._addresses.pop(worker, None)
