"""The control plane as the driver offers it: passes what an operator asks on to the controller. Decides nothing."""

from cluster.control import DEFAULT_OPTIONS
from cluster.driver.processes import ClusterProcesses
from cluster.operation import ChangeOptions, ClusterView, HostLoad, Operation, PlacementView
from cluster.reading import ClusterReading

READING_TIMEOUT_S = 3.0  # a controller that answers waits for workers a second less
CHANGE_TIMEOUT_S = 60.0  # a plan for a large model takes seconds


class DriverControl:
    """A `ControlPlane`. UnavailableError while the controller or, for changes, the head of Ray is away."""

    def __init__(self, processes: ClusterProcesses) -> None:
        self._processes = processes

    def view(self) -> ClusterView:
        """Describe the cluster and every process of it."""
        answer: ClusterView = self._processes.ask("view")
        return answer

    def scale(self, num_hosts: int, *, options: ChangeOptions = DEFAULT_OPTIONS) -> Operation:
        """Begin to bring the expert pool to `num_hosts`."""
        return self._change("scale", num_hosts, options)

    def rebalance(self, *, options: ChangeOptions = DEFAULT_OPTIONS) -> Operation:
        """Begin to move experts by measured load."""
        return self._change("rebalance", options)

    def drain(self, worker: str, *, options: ChangeOptions = DEFAULT_OPTIONS) -> Operation:
        """Begin to move everything off one expert host and end it."""
        return self._change("drain", worker, options)

    def operations(self) -> tuple[Operation, ...]:
        """List operations, newest first."""
        answer: tuple[Operation, ...] = self._processes.ask("operations")
        return answer

    def operation(self, name: str) -> Operation:
        """Return one operation."""
        answer: Operation = self._processes.ask("operation", name)
        return answer

    def cancel(self, name: str) -> None:
        """Ask an operation to roll back."""
        self._processes.ask("cancel", name)

    def delete(self, name: str) -> None:
        """Forget an ended operation."""
        self._processes.ask("delete", name)

    def placement(self) -> PlacementView:
        """Say who holds what."""
        answer: PlacementView = self._processes.ask("placement")
        return answer

    def loads(self) -> tuple[HostLoad, ...]:
        """Read every live host's counters."""
        answer: tuple[HostLoad, ...] = self._processes.ask("loads")
        return answer

    def reading(self) -> ClusterReading:
        """Return what is measured of the cluster."""
        answer: ClusterReading = self._processes.ask("reading", timeout_s=READING_TIMEOUT_S)
        return answer

    def head_answers(self) -> bool:
        """Tell whether the head of Ray answers: without it nothing can be changed."""
        return self._processes.head_answers()

    def _change(self, method: str, *arguments: object) -> Operation:
        self._processes.check_head()
        answer: Operation = self._processes.ask(method, *arguments, timeout_s=CHANGE_TIMEOUT_S)
        return answer
