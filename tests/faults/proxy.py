"""A proxy for TCP and Unix sockets whose directions can be poisoned while it runs; knows nothing of what it carries."""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Self, TypeVar

from llama4_dist.dispatch.links.address import address_of, bind, parse_address
from tests.faults.connection import Connection
from tests.faults.toxics import NONE, Counters, Direction, Toxics

CALL_TIMEOUT_S = 10.0
Answer = TypeVar("Answer")


class Proxy:
    """Listens at `address`, forwards to `upstream`, both as "tcp:host:port" or "unix:/path", in one thread of its own.

    Every method may be called from any thread; all of them act within the proxy's thread, so none sees half a change.
    """

    def __init__(self, upstream: str, *, listen: str = "tcp:127.0.0.1:0", seed: int = 0) -> None:
        self._family, self._target = parse_address(upstream)
        self._seed = seed
        self._toxics = dict.fromkeys(Direction, NONE)
        self._counters = {direction: Counters() for direction in Direction}
        self._connections: dict[int, Connection] = {}
        self._num_accepted = 0
        self._is_closing = False
        self._failure: BaseException | None = None
        self._calls: list[Callable[[], None]] = []
        self._listener = bind(listen, 128)
        self.address = address_of(self._listener)
        self._waker, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"proxy {self.address}", daemon=True)
        self._thread.start()

    @property
    def host_port(self) -> str:
        """The address as gRPC spells it."""
        return self.address.removeprefix("tcp:")

    def set(self, direction: Direction, toxics: Toxics) -> dict[Direction, Counters]:
        """Poison a direction of all connections, running and new; `Toxics()` heals it. Return the counts until then."""

        def change() -> dict[Direction, Counters]:
            until_then = {each: replace(counters) for each, counters in self._counters.items()}
            self._toxics[direction] = toxics
            for connection in self._connections.values():
                connection.pipes[direction].change(toxics)
            return until_then

        return self._call(change)

    def toxics(self, direction: Direction) -> Toxics:
        return self._call(lambda: self._toxics[direction])

    def counters(self, direction: Direction) -> Counters:
        """Return what happened to a direction's bytes so far."""
        return self._call(
            lambda: replace(
                self._counters[direction], held=sum(one.held(direction) for one in self._connections.values())
            )
        )

    def connections(self) -> frozenset[int]:
        """Return the numbers of the open connections."""
        return self._call(lambda: frozenset(self._connections))

    def shut(self, direction: Direction) -> frozenset[int]:
        """Return the numbers of those open connections whose receiver in this direction has seen the end."""
        return self._call(lambda: frozenset(n for n, one in self._connections.items() if one.pipes[direction].is_shut))

    def reset(self) -> None:
        """End all open connections with a RST to both sides (over Unix sockets, with their end)."""

        def reset_all() -> None:
            for connection in self._connections.values():
                connection.reset()

        self._call(reset_all)

    def half_close(self, direction: Direction) -> None:
        """Tell the receivers of all open connections that nothing more comes; what still comes is dropped."""

        def half_close_all() -> None:
            for connection in self._connections.values():
                connection.half_close(direction)

        self._call(half_close_all)

    def close(self) -> None:
        """End everything; raise what went wrong in the thread, if anything did."""
        with contextlib.suppress(OSError):
            self._is_closing = True
            self._waker.send(b"c")
        self._thread.join(CALL_TIMEOUT_S)
        assert not self._thread.is_alive(), "the proxy's thread does not end"
        self._waker.close()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, action: Callable[[], Answer]) -> Answer:
        """Run an action within the thread and return its answer."""
        answers: list[Answer] = []
        done = threading.Event()

        def run() -> None:
            answers.append(action())
            done.set()

        self._calls.append(run)
        with contextlib.suppress(OSError):
            self._waker.send(b"a")
        if not done.wait(CALL_TIMEOUT_S if self._thread.is_alive() else 0.0):
            raise RuntimeError(f"the proxy at {self.address} does not answer: closed, or failed: {self._failure!r}")
        return answers[0]

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._turn()
        except BaseException as failure:  # noqa: BLE001  the caller's thread raises it
            self._failure = failure
        finally:
            for connection in self._connections.values():
                connection.close()
            self._selector.close()
            self._listener.close()
            self._woken.close()

    def _turn(self) -> None:
        now_s = time.monotonic()
        dues = [due for one in self._connections.values() if (due := one.watch(self._selector, now_s)) is not None]
        timeout_s = max(0.0, min(dues) - now_s) if dues else None
        for key, mask in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._woken:
                self._woken.recv(4096)
            elif key.fd >= 0:
                key.data.work(key.fileobj, mask, time.monotonic())
        while self._calls:
            self._calls.pop(0)()
        for number, connection in list(self._connections.items()):
            if connection.settle():
                connection.unwatch(self._selector)
                connection.close()
                del self._connections[number]

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            client, _ = self._listener.accept()
            server = socket.socket(self._family, socket.SOCK_STREAM)
            self._num_accepted += 1
            connection = Connection(client, server, self._counters, f"{self._seed}.{self._num_accepted}")
            for direction, toxics in self._toxics.items():
                connection.pipes[direction].change(toxics)
            connection.open(self._target)
            self._connections[self._num_accepted] = connection
