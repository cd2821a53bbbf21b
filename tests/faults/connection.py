"""One proxied connection: two sockets and a pipe each way; does with them what the pipes decide."""

import contextlib
import fcntl
import selectors
import socket
import struct
import termios
from collections.abc import Mapping

from tests.faults.pipe import Pipe
from tests.faults.toxics import Counters, Direction

MAX_READ = 64 * 1024
TO_SERVER, TO_CLIENT = Direction.TO_SERVER, Direction.TO_CLIENT


class Connection:
    """`watch`, then `work` for each event, then `settle`; the proxy's thread alone may touch it."""

    def __init__(
        self, client: socket.socket, server: socket.socket, counters: Mapping[Direction, Counters], seed: str
    ) -> None:
        self.pipes = {direction: Pipe(counters[direction], f"{seed}.{direction}") for direction in Direction}
        self._source = {TO_SERVER: client, TO_CLIENT: server}
        self._receiver = {TO_SERVER: server, TO_CLIENT: client}
        self._watched: dict[socket.socket, int] = {}
        self._is_reset = False
        for one in (client, server):
            one.setblocking(False)
            if one.family != socket.AF_UNIX:
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def open(self, target: str | tuple[str, int]) -> None:
        """Begin to connect to the server; a refusal resets the client."""
        try:
            self._receiver[TO_SERVER].connect(target)
        except BlockingIOError:
            return  # under way; the selector tells
        except OSError:
            self.reset()

    def held(self, direction: Direction) -> int:
        """Count bytes that wait here or in the socket they came by."""
        waiting = bytearray(4)
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._source[direction].fileno(), termios.FIONREAD, waiting)
        return self.pipes[direction].num_buffered + int(struct.unpack("i", waiting)[0])

    def watch(self, selector: selectors.BaseSelector, now_s: float) -> float | None:
        """Ask the selector for what the pipes want; return when to look again, if that is known."""
        wanted = dict.fromkeys(self._source.values(), 0)
        dues = []
        for direction, pipe in self.pipes.items():
            due_s = pipe.due_s(now_s)
            if pipe.wants_more:
                wanted[self._source[direction]] |= selectors.EVENT_READ
            if due_s is not None and due_s <= now_s:
                wanted[self._receiver[direction]] |= selectors.EVENT_WRITE
            elif due_s is not None:
                dues.append(due_s)
        for one, mask in wanted.items():
            self._ask(selector, one, mask)
        return min(dues, default=None)

    def unwatch(self, selector: selectors.BaseSelector) -> None:
        for one in self._source.values():
            self._ask(selector, one, 0)

    def work(self, one: socket.socket, mask: int, now_s: float) -> None:
        """Read from and write to a socket that is ready."""
        if self._is_reset:
            return
        try:
            for direction, pipe in self.pipes.items():
                if mask & selectors.EVENT_WRITE and one is self._receiver[direction] and (part := pipe.ready(now_s)):
                    pipe.sent(one.send(part), now_s)
                if mask & selectors.EVENT_READ and one is self._source[direction] and pipe.wants_more:
                    received = one.recv(MAX_READ)
                    pipe.at_end = not received
                    if received:
                        pipe.take(received, now_s)
        except BlockingIOError:
            return
        except OSError:
            self.reset()  # as it came from one side, so it goes to the other

    def settle(self) -> bool:
        """Pass on ends; return whether the connection is over."""
        if any(pipe.is_cut and pipe.toxics.drop_after is not None for pipe in self.pipes.values()):
            self.reset()
        for direction, pipe in self.pipes.items():
            if pipe.is_finished and not self._is_reset:
                self._end(direction)
        return self._is_reset or all(pipe.is_shut for pipe in self.pipes.values())

    def reset(self) -> None:
        """Have `close` send a RST both ways."""
        if not self._is_reset:
            self._is_reset = True
            for direction, one in self._source.items():
                self.pipes[direction].discard()
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def half_close(self, direction: Direction) -> None:
        """Tell the receiver that nothing more comes, and drop what does."""
        self.pipes[direction].discard()
        self._end(direction)

    def close(self) -> None:
        for one in self._source.values():
            one.close()

    def _end(self, direction: Direction) -> None:
        self.pipes[direction].is_shut = True
        with contextlib.suppress(OSError):
            self._receiver[direction].shutdown(socket.SHUT_WR)

    def _ask(self, selector: selectors.BaseSelector, one: socket.socket, mask: int) -> None:
        asked = self._watched.get(one, 0)
        if mask == asked:
            return
        self._watched[one] = mask
        if not mask:
            selector.unregister(one)
        elif asked:
            selector.modify(one, mask, self)
        else:
            selector.register(one, mask, self)
