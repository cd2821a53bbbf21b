"""What an operator can ask of a cluster; the gRPC service, the command line and tests speak to this port."""

from typing import Protocol

from cluster.operation import ChangeOptions, ClusterView, HostLoad, Operation, PlacementView

DEFAULT_OPTIONS = ChangeOptions()


class ControlPlane(Protocol):
    """Blocking and thread-safe. UnavailableError while the controller or the Ray head is away; serving goes on then."""

    def view(self) -> ClusterView:
        """Describe the cluster and every process of it."""

    def scale(self, num_hosts: int, *, options: ChangeOptions = DEFAULT_OPTIONS) -> Operation:
        """Begin to bring the expert pool to `num_hosts` and return at once.

        InvalidRequestError for a number below 1, ConflictError while another operation runs (it names that one),
        PreconditionError where memory, nodes or replicas forbid it.
        """

    def rebalance(self, *, options: ChangeOptions = DEFAULT_OPTIONS) -> Operation:
        """Begin to move experts by measured load, as far as that pays."""

    def drain(self, worker: str, *, options: ChangeOptions = DEFAULT_OPTIONS) -> Operation:
        """Begin to move everything off one expert host and end it; NotFoundError for an unknown one."""

    def operations(self) -> tuple[Operation, ...]:
        """List operations, newest first; a bounded number of ended ones is kept."""

    def operation(self, name: str) -> Operation:
        """Return one operation; NotFoundError."""

    def cancel(self, name: str) -> None:
        """Ask an operation to roll back; idempotent, too late once it commits. NotFoundError."""

    def delete(self, name: str) -> None:
        """Forget an ended operation; PreconditionError while it runs, NotFoundError."""

    def placement(self) -> PlacementView:
        """Say who holds what."""

    def loads(self) -> tuple[HostLoad, ...]:
        """Read every live host's counters."""
