"""Which topology a worker was told last, and by which controller; refuses what is older. Changes no route."""

import threading

from cluster.worker import Topology
from llama4_dist.errors import PreconditionError


class Epochs:
    """Hold `publishing` while a topology is checked, adopted and noted."""

    def __init__(self) -> None:
        self.publishing = threading.Lock()
        self.topology: Topology | None = None
        self._controller = 0  # the youngest that has spoken

    @property
    def epoch(self) -> int:
        """The epoch in use, 0 before the first."""
        return 0 if self.topology is None else self.topology.epoch

    def check(self, topology: Topology) -> None:
        """Raise PreconditionError where whoever publishes a topology has missed something."""
        if topology.publisher < self._controller:
            raise PreconditionError(
                f"epoch {topology.epoch} is of a controller that was replaced", reason="STALE_CONTROLLER"
            )
        if topology.epoch <= self.epoch:
            raise PreconditionError(
                f"epoch {topology.epoch} is not newer than {self.epoch}, which is in use here", reason="STALE_EPOCH"
            )

    def note(self, topology: Topology) -> None:
        """Remember what was adopted."""
        self.topology = topology
        self._controller = topology.publisher

    def claim(self, controller: int) -> Topology | None:
        """Return what was told last, and take nothing of an older controller from now on."""
        with self.publishing:
            self._controller = max(self._controller, controller)
            return self.topology
