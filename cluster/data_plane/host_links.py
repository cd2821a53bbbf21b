"""One attention worker's links to expert hosts: dials them, and dials again those that went down. Routes nothing.

Runs beside the engine: the token loop never waits for a dial. A host is dialled again as long as the topology names
that life of it; one that computes wrong answers is not.
"""

import logging
import threading
from collections.abc import Callable, Mapping

from cluster.worker import HostAddress
from llama4_dist.dispatch.links.link import Link
from llama4_dist.errors import HandshakeError, LinkDownError

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 2.0
WRONG = "ANSWER_WRONG"  # the dispatcher's reason for giving up a host that must not come back
ALREADY = "DUPLICATE_PEER"  # a host's reason for refusing a second link of this worker

Dial = Callable[[HostAddress], Link]
Restore = Callable[[Link], None]  # puts a link into use, or aborts it if it is of no use any more; raises if it cannot


class HostLinks:
    """Links by host, of the topology last taken. Thread-safe; `lost` may be called from the engine's thread."""

    def __init__(self, dial: Dial, restore: Restore) -> None:
        self._dial = dial
        self._restore = restore
        self._lock = threading.Lock()
        self._hosts: Mapping[str, HostAddress] = {}
        self._dialled: dict[str, Link] = {}  # up, and not in use yet
        self._down: dict[str, int] = {}  # host to its incarnation
        self._barred: set[tuple[str, int]] = set()  # (host, incarnation)
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="host-links", daemon=True)

    def connect(self, hosts: Mapping[str, HostAddress], in_use: Mapping[str, Link]) -> None:
        """Dial every host of which there is no link; raises the first failure."""
        for host, address in hosts.items():
            if (host, address.incarnation) in self._barred or self._known(host, address, in_use) is not None:
                continue
            try:
                self._keep(host, self._reach(address))
            except HandshakeError as error:
                if error.reason != ALREADY:  # else it was dialled again meanwhile
                    raise

    def take(self, hosts: Mapping[str, HostAddress], in_use: Mapping[str, Link]) -> dict[str, Link]:
        """Return a link to every host that can be reached, and dial no other hosts from now on.

        The caller names those that did not make it into use as `lost`.
        """
        links: dict[str, Link] = {}
        for host, address in hosts.items():
            if (host, address.incarnation) in self._barred:
                continue
            link = self._known(host, address, in_use)
            try:
                links[host] = link if link is not None else self._reach(address)
            except LinkDownError as error:
                log.warning("host_unreachable host=%s reason=%s", host, error.reason)
        with self._lock:
            unused = [link for host, link in self._dialled.items() if links.get(host) is not link]
            self._dialled.clear()
            self._hosts = dict(hosts)
        for link in unused:
            link.abort()
        return links

    def lost(self, host: str, incarnation: int, reason: str) -> None:
        """Dial a host again whose link went down."""
        with self._lock:
            if reason == WRONG:
                log.error("host_barred host=%s incarnation=%d", host, incarnation)
                self._barred.add((host, incarnation))
            if self._closing or (host, incarnation) in self._barred:
                return
            self._down[host] = incarnation
            if self._thread.ident is None:
                self._thread.start()
        self._wake.set()

    def close(self) -> None:
        """Stop dialling; abort what is not in use."""
        with self._lock:
            self._closing = True
            started = self._thread.ident is not None
        self._wake.set()
        if started:
            self._thread.join()
        with self._lock:
            for link in self._dialled.values():
                link.abort()
            self._dialled.clear()

    def _known(self, host: str, address: HostAddress, in_use: Mapping[str, Link]) -> Link | None:
        """Return the link there is to this life of a host."""
        with self._lock:
            candidates = (in_use.get(host), self._dialled.get(host))
        return next(
            (one for one in candidates if one is not None and one.peer_incarnation == address.incarnation), None
        )

    def _reach(self, address: HostAddress) -> Link:
        """Dial this life of a host; LinkDownError if another one answers."""
        link = self._dial(address)
        if link.peer_incarnation != address.incarnation:
            link.abort()
            raise LinkDownError(
                f"{address.host} answers as incarnation {link.peer_incarnation}, not {address.incarnation}",
                reason="OTHER_INCARNATION",
            )
        return link

    def _keep(self, host: str, link: Link) -> None:
        """Keep a link until a topology takes it."""
        with self._lock:
            useless = link if self._closing else self._dialled.pop(host, None)
            if not self._closing:
                self._dialled[host] = link
        if useless is not None:
            useless.abort()

    def _run(self) -> None:
        delay_s: float | None = None
        while not self._closing:
            self._wake.wait(delay_s)
            fresh = self._wake.is_set()
            self._wake.clear()
            delay_s = FIRST_RETRY_S if fresh or delay_s is None else min(LONGEST_RETRY_S, 2 * delay_s)
            if not self._dial_again():
                delay_s = None  # until somebody is lost

    def _dial_again(self) -> bool:
        """Try every host that is down once; return whether some still is."""
        with self._lock:
            down, self._down = self._down, {}  # whatever is lost from here on is noted anew
        for host, incarnation in down.items():
            address = self._hosts.get(host)
            wanted = address is not None and address.incarnation == incarnation and not self._closing
            if address is not None and wanted and not self._try(host, address):
                with self._lock:
                    self._down.setdefault(host, incarnation)
        with self._lock:
            return bool(self._down)

    def _try(self, host: str, address: HostAddress) -> bool:
        """Dial one host and put the link into use; return whether that is done with, one way or the other."""
        try:
            link = self._reach(address)
        except LinkDownError as error:
            log.debug("host_still_down host=%s reason=%s", host, error.reason)
            return False
        try:
            self._restore(link)
        except Exception as error:  # noqa: BLE001 - whatever it was, the other hosts are to be dialled again too
            log.warning("host_not_restored host=%s cause=%s", host, error)
            link.abort()
            return False
        log.info("host_restored host=%s incarnation=%d", host, address.incarnation)
        return True
