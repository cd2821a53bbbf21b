"""All descriptors of a server in one epoll: listeners, handshakes, links, and a bell to wake it. Knows no frames."""

import contextlib
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence

from llama4_dist.dispatch.handshake import Hello
from llama4_dist.dispatch.links.link import Link, LinkLimits
from llama4_dist.dispatch.links.listener import Listener, Lobby
from llama4_dist.dispatch.links.patience import patience

_SWEEP_S = 0.25  # how often timeouts are looked at


class Hub:
    """Tells which links are worth polling. Links without a descriptor always are."""

    def __init__(self, hello: Hello, limits: LinkLimits, admit: Callable[[Hello], None], closed: Counter[str]) -> None:
        self._lobby = Lobby(hello, limits, admit, closed)
        self._epoll = select.epoll()
        self._patience = patience(self._epoll)
        self._bell, self._rope = socket.socketpair()
        self._epoll.register(self._bell.fileno(), select.EPOLLIN)
        self.listeners: dict[int, Listener] = {}
        self._links: dict[int, Link] = {}
        self._wants_write: set[int] = set()
        self._driven: list[Link] = []
        self._next_sweep = 0.0

    def add_listener(self, listener: Listener) -> None:
        self.listeners[listener.socket.fileno()] = listener
        self._epoll.register(listener.socket.fileno(), select.EPOLLIN)

    def add(self, link: Link) -> None:
        descriptor = link.fileno()
        if descriptor is None:
            self._driven.append(link)
        else:
            self._links[descriptor] = link
            self._epoll.register(descriptor, select.EPOLLIN)

    def remove(self, link: Link) -> None:
        """Stop watching a link; call before it is aborted, while its descriptor is still its own."""
        descriptor = link.fileno()
        if descriptor is None:
            self._driven.remove(link)
        else:
            del self._links[descriptor]
            self._wants_write.discard(descriptor)
            self._epoll.unregister(descriptor)

    def watch_sending(self, link: Link) -> None:
        """Also wake up when this link can send on; call after posting to it."""
        descriptor = link.fileno()
        if descriptor is not None and link.num_unsent and descriptor not in self._wants_write:
            self._wants_write.add(descriptor)
            self._epoll.modify(descriptor, select.EPOLLIN | select.EPOLLOUT)

    def wait(self, timeout_s: float) -> tuple[Sequence[Link], Sequence[Link]]:
        """Return (links worth polling, links that finished their handshake), after at most `timeout_s`."""
        if self._driven:
            if not self._links and not self.listeners:
                return self._driven, ()
            timeout_s = 0.0
        events = self._patience.wait(min(timeout_s, _SWEEP_S))
        ready: list[Link] = self._driven[:]
        new: list[Link] = []
        for descriptor, _ in events:
            link = self._links.get(descriptor)
            if link is not None:
                self._settle(descriptor, link)
                ready.append(link)
            elif descriptor in self._lobby.half_open:
                self._advance(descriptor, new)
            elif descriptor in self.listeners:
                for accepted in self._lobby.accept(self.listeners[descriptor]):
                    self._epoll.register(accepted, select.EPOLLIN)
            elif descriptor == self._bell.fileno():
                self._bell.recv(4096)
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + _SWEEP_S
            self._lobby.sweep()
            ready = [*self._driven, *self._links.values()]  # polling a link also checks its timeouts
        return ready, new

    def wake(self) -> None:
        """Make a running `wait` return; the one call that another thread may make."""
        with contextlib.suppress(OSError):  # closed meanwhile: nobody is left to be woken
            self._rope.send(b"\0")

    def close(self) -> None:
        """Close listeners and unfinished handshakes, not the links."""
        self._lobby.close()
        for listener in self.listeners.values():
            listener.close()
        self.listeners.clear()
        self._epoll.close()
        self._bell.close()
        self._rope.close()

    def _advance(self, descriptor: int, new: list[Link]) -> None:
        link = self._lobby.advance(descriptor)
        if link is not None:
            self._epoll.unregister(descriptor)
            new.append(link)

    def _settle(self, descriptor: int, link: Link) -> None:
        """Stop waiting to send where nothing is queued any more; polling the link has flushed it, or will now."""
        if descriptor in self._wants_write and not link.num_unsent:
            self._wants_write.discard(descriptor)
            self._epoll.modify(descriptor, select.EPOLLIN)
