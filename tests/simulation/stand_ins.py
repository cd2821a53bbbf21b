"""What the cluster's modules see instead of time, threads and waiting, so that one thread runs them by one clock."""

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent import futures
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION, Future
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import cluster.control_plane.controller
import llama4_dist.dispatch.computation
from cluster.control_plane.watch import Watch
from tests.simulation.clock import Clock

POLL_S = 0.05


class Surroundings(Protocol):
    """The world, as far as somebody who waits needs it."""

    clock: Clock

    def pass_time(self, seconds: float) -> None: ...
    def begin_thread(self, name: str, run: Callable[[], None]) -> None: ...


class Waited(NamedTuple):
    """Lists, where the real one gives sets: sets of objects have another order every time."""

    done: list[Future[Any]]
    not_done: list[Future[Any]]


class Waiting:
    """Waits by letting the world's time pass."""

    def __init__(self, world: Surroundings) -> None:
        self._world = world

    def wait(
        self, calls: Iterable[Future[Any]], timeout: float | None = None, return_when: str = ALL_COMPLETED
    ) -> Waited:
        """Stands in for `concurrent.futures.wait`."""
        every = list(calls)
        assert timeout is not None, "somebody waits without a deadline"
        self.until(lambda: _satisfied(every, return_when), timeout)
        return Waited([call for call in every if call.done()], [call for call in every if not call.done()])

    def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        clock = self._world.clock
        deadline = clock.now + timeout_s
        while not condition() and clock.now < deadline:
            self._world.pass_time(max(1e-6, min(POLL_S, deadline - clock.now)))
        return condition()


def _satisfied(calls: Collection[Future[Any]], return_when: str) -> bool:
    done = [call for call in calls if call.done()]
    if len(done) == len(calls) or (return_when == FIRST_COMPLETED and done):
        return True
    return return_when == FIRST_EXCEPTION and any(call.exception() for call in done)


class Threads:
    """Stands in for `threading`: a thread is told to the world, which runs it when it likes, or never."""

    Lock = staticmethod(threading.Lock)
    Event = staticmethod(threading.Event)

    def __init__(self, world: Surroundings, *, runs: bool) -> None:
        self._world, self._runs = world, runs

    def Thread(
        self, *, target: Callable[..., None], args: tuple[object, ...] = (), name: str, daemon: bool
    ) -> "_Thread":
        return _Thread(self._world, name, (lambda: target(*args)) if self._runs else None)

    def Condition(self) -> "_Condition":
        return _Condition(Waiting(self._world), self._world)


class _Thread:
    def __init__(self, world: Surroundings, name: str, run: Callable[[], None] | None) -> None:
        self._world, self._name, self._run = world, name, run
        self.ident: int | None = None

    def start(self) -> None:
        self.ident = 1
        if self._run is not None:
            self._world.begin_thread(self._name, self._run)

    def join(self) -> None:
        pass


class _Condition:
    """One thread runs, so nobody has to be kept out."""

    def __init__(self, waiting: Waiting, world: Surroundings) -> None:
        self._waiting, self._world = waiting, world

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass

    def notify_all(self) -> None:
        pass

    def wait(self, timeout: float) -> None:
        self._world.pass_time(timeout)

    def wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        return self._waiting.until(condition, timeout)


# Modules whose threads the world runs, and those of which it does itself what they would.
RUNNING = ("control_plane.controller", "control_plane.revival", "control_plane.provisioning")
IDLE = ("control_plane.watch", "data_plane.host_links")


@contextmanager
def installed(world: Surroundings) -> Iterator[None]:
    """Put the stand-ins in place for as long as this world runs."""
    clock = world.clock
    changes: list[tuple[ModuleType, str, object]] = [
        (cluster.control_plane.controller, "Watch", lambda controller: Watch(controller, clock=clock.monotonic)),
        (llama4_dist.dispatch.computation, "time", clock),
    ]
    for names, runs in ((RUNNING, True), (IDLE, False)):
        threads = Threads(world, runs=runs)
        changes += [(sys.modules[f"cluster.{name}"], "threading", threads) for name in names]
    stand_ins: dict[object, object] = {time: clock, futures.wait: Waiting(world).wait}
    for name, module in tuple(sys.modules.items()):
        if name.startswith("cluster."):
            for real, stand_in in stand_ins.items():
                changes += [(module, key, stand_in) for key, value in vars(module).items() if value is real]
    before = [(module, key, getattr(module, key)) for module, key, _ in changes]
    for module, key, stand_in in changes:
        setattr(module, key, stand_in)
    try:
        yield
    finally:
        for module, key, original in before:
            setattr(module, key, original)
