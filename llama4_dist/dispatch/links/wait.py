"""Waiting on many links at once. Knows nothing of frames."""

import select
from collections.abc import Mapping

from llama4_dist.dispatch.links.link import Clock, Link
from llama4_dist.dispatch.links.patience import patience

DRIVEN_POLL_S = 0.001  # how often links without a descriptor are looked at


class LinkWaiter:
    """Waits until some link can be read, or written where frames are queued. The links are fixed."""

    def __init__(self, links: Mapping[str, Link], clock: Clock) -> None:
        self._links = dict(links)
        self._clock = clock
        self._epoll = select.epoll()
        self.patience = patience(self._epoll)
        self._hosts: dict[int, str] = {}
        self._interest: dict[int, int] = {}
        for host, link in self._links.items():
            descriptor = link.fileno()
            if descriptor is not None:
                self._hosts[descriptor] = host
                self._epoll.register(descriptor, select.EPOLLIN)
                self._interest[descriptor] = select.EPOLLIN
        self._driven = frozenset(self._links) - frozenset(self._hosts.values())
        self.waits = not self._driven  # `wait` tells by itself who is worth polling

    def forget(self, host: str) -> None:
        """Stop watching a link; call before it is aborted, while its descriptor is still its own."""
        self._links.pop(host, None)
        self._driven -= {host}
        for descriptor in [fd for fd, name in self._hosts.items() if name == host]:
            self._epoll.unregister(descriptor)
            del self._hosts[descriptor], self._interest[descriptor]

    def wait(self, timeout_s: float, has_looked: bool = False) -> frozenset[str]:
        """Return the hosts whose links are worth polling, after at most `timeout_s`."""
        if self._driven:
            timeout_s = min(timeout_s, DRIVEN_POLL_S)
        if not self._hosts:
            self._clock.sleep(timeout_s)
            return self._driven
        for descriptor, host in self._hosts.items():
            wanted = select.EPOLLIN | select.EPOLLOUT if self._links[host].num_unsent else select.EPOLLIN
            if wanted != self._interest[descriptor]:
                self._epoll.modify(descriptor, wanted)
                self._interest[descriptor] = wanted
        ready = self.patience.wait(timeout_s, has_looked)
        if not self._driven and len(ready) == 1:
            return frozenset((self._hosts[ready[0][0]],))
        return self._driven | {self._hosts[descriptor] for descriptor, _ in ready}
