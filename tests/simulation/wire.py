"""Calls of control: what is on its way, late or lost. Each call is a moment. Knows no tensor."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from cluster.worker import Role, Topology
from llama4_dist.errors import EngineError, UnavailableError
from tests.simulation.expert_process import HostDied

if TYPE_CHECKING:
    from tests.simulation.attention_process import SimAttention
    from tests.simulation.expert_process import SimHost
    from tests.simulation.world import World


class ControllerDied(BaseException):
    """Unwinds what a controller was doing when it was killed; not an Exception, so that nothing of it handles it."""


@dataclass(slots=True)
class Life:
    """A controller's: handles of one that is over are of no use."""

    over: bool = False


@dataclass(slots=True, eq=False)
class Handle:
    """Satisfies `cluster.handle.Handle`, for one controller."""

    process: "SimHost | SimAttention"
    world: "World"
    life: Life
    worker: str = ""
    role: Role = Role.EXPERT

    def __post_init__(self) -> None:
        self.worker, self.role = self.process.name, self.process.role

    def call(self, method: str, *arguments: object) -> Future[Any]:
        return self.world.wire.call(self, method, arguments)

    def kill(self) -> None:
        self.process.kill()


@dataclass(slots=True, eq=False)
class _Call:
    process: "SimHost | SimAttention"
    method: str
    arguments: tuple[object, ...]
    due_s: float
    fault: str
    answer: Future[Any] = field(default_factory=Future)


class Wire:
    """Calls that have not been answered."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._pending: list[_Call] = []
        self.next_fault: tuple[str, float] | None = None  # of the call that is being made: (kind, seconds)

    def call(self, handle: Handle, method: str, arguments: tuple[object, ...]) -> Future[Any]:
        """Make a call; it is answered at once, later if the process is stopped or the call is late, or never."""
        world = self._world
        self.next_fault = None
        world.at_call(handle, method)
        fault, delay_s = self.next_fault or ("", 0.0)
        call = _Call(handle.process, method, arguments, world.clock.now + delay_s, fault)
        if delay_s or handle.process.stopped:
            self._pending.append(call)
        else:
            self._run(call)
        return call.answer

    def deliver(self) -> None:
        """Answer what is due. A worker in the middle of a step is not told anything."""
        now_s = self._world.clock.now
        due = [
            call
            for call in self._pending
            if not call.process.alive
            or (call.due_s <= now_s and not call.process.stopped and call.process is not self._world.stepping)
        ]
        for call in due:
            self._pending.remove(call)
            self._run(call)

    def controller_died(self) -> None:
        """Lose the epochs on their way that no attention worker has; all else arrives when nobody expects it.

        An epoch that comes after the next controller has asked for it would be one of two of the same number: only
        in the variant `late`.
        """
        if self._world.plan.late_epochs:
            return
        newest = max((worker.epoch for worker in self._world.attention), default=0)
        self._pending = [
            call
            for call in self._pending
            if call.method != "publish" or cast(Topology, call.arguments[0]).epoch <= newest
        ]

    def _run(self, call: _Call) -> None:
        process = call.process
        try:
            if not process.alive:
                raise HostDied
            if call.fault == "fails":
                raise EngineError(f"{call.method} failed on {process.name}")
            self._world.note(f"{process.name}.{call.method}") if call.method not in QUIET else None
            result = getattr(process, call.method)(*call.arguments)
            if not process.alive and call.method != "close":
                raise HostDied
            if call.fault == "answer_lost":
                raise UnavailableError(f"{process.name} did not answer", reason="TIMEOUT")
            call.answer.set_result(result)
        except HostDied:
            call.answer.set_exception(UnavailableError(f"{process.name} died", reason="WORKER_LOST"))
        except Exception as error:  # noqa: BLE001 - carried to the caller
            call.answer.set_exception(error)


QUIET = frozenset({"status", "load_now", "progress", "location"})
