"""Faults of a byte stream, through a proxy; each is proven by what the proxy counted, so bytes must flow meanwhile."""

import time
from collections.abc import Iterator
from dataclasses import replace

from tests.faults.fault import Fault, FaultNotVerified, must
from tests.faults.proxy import Proxy
from tests.faults.toxics import NONE, Counters, Direction, Toxics

MIN_RATE_WINDOW_S = 0.2


class Toxic(Fault):
    """Toxics on one direction of a proxy. `verify` waits up to `timeout_s` for traffic that shows each of them."""

    def __init__(
        self,
        proxy: Proxy,
        direction: Direction,
        toxics: Toxics,
        *,
        aim: Direction | None = None,
        timeout_s: float = 2.0,
    ) -> None:
        self._proxy, self._direction, self.toxics = proxy, direction, toxics
        self._aim = aim or direction
        self._timeout_s = timeout_s
        self._before = Counters()
        self._begun_s = 0.0
        self._passed_at_heal = 0

    def inject(self) -> None:
        self._before = self._proxy.set(self._aim, self.toxics)[self._direction]
        self._begun_s = time.monotonic()

    def verify(self) -> None:
        must(lambda: not list(self._missing()), lambda: self._claim(), timeout_s=self._timeout_s)

    def heal(self) -> None:
        self._passed_at_heal = self._proxy.counters(self._direction).passed
        self._proxy.set(self._aim, NONE)

    def verify_healed(self) -> None:
        """Nothing is poisoned, and what was held goes on its way."""
        if any(self._proxy.toxics(direction) != NONE for direction in (self._aim, self._direction)):
            raise FaultNotVerified(f"{self._direction} of {self._proxy.address} is still poisoned")
        must(self._flows, lambda: f"bytes {self._direction} flow again: {self._proxy.counters(self._direction)}")

    def _flows(self) -> bool:
        counters = self._proxy.counters(self._direction)
        return counters.held == 0 or counters.passed > self._passed_at_heal

    def _claim(self) -> str:
        changes = self._changes(self._proxy.counters(self._direction))
        return f"{', '.join(self._missing())} shows in the traffic {self._direction}; since injection: {changes}"

    def _changes(self, now: Counters) -> Counters:
        names = ("read", "passed", "delayed", "corrupted", "dropped", "num_sends", "num_cut")
        return replace(now, **{name: getattr(now, name) - getattr(self._before, name) for name in names})

    def _missing(self) -> Iterator[str]:
        """Name the toxics that no traffic has shown yet."""
        toxics, seen = self.toxics, self._changes(self._proxy.counters(self._direction))
        elapsed_s = time.monotonic() - self._begun_s
        shown = {
            "delay": toxics.delay_s + toxics.jitter_s == 0 or seen.delayed > 0,
            "slices": toxics.slice_bytes is None
            or 0 < toxics.slice_bytes < seen.passed <= seen.num_sends * toxics.slice_bytes,
            "corruption": toxics.corrupt_every is None or seen.corrupted > 0,
            "blackhole": not toxics.blackhole or (seen.held > 0 and seen.passed == 0),
            "cut": (toxics.silent_after is None and toxics.drop_after is None) or seen.num_cut > 0,
            "bandwidth": toxics.bytes_per_s is None
            or (
                seen.held > 0 and elapsed_s > MIN_RATE_WINDOW_S and seen.passed <= toxics.bytes_per_s * elapsed_s * 1.2
            ),
        }
        return (name for name, is_shown in shown.items() if not is_shown)


class Reset(Fault):
    """A RST to both sides of every open connection; new ones are let through. `aim` is another proxy."""

    def __init__(self, proxy: Proxy, *, aim: Proxy | None = None) -> None:
        self._proxy, self._aim = proxy, aim or proxy
        self._open: frozenset[int] = frozenset()

    def inject(self) -> None:
        self._open = self._proxy.connections()
        self._aim.reset()

    def verify(self) -> None:
        if not self._open:
            raise FaultNotVerified(f"{self._proxy.address} had no connection to reset")
        must(lambda: not self._open & self._proxy.connections(), f"{len(self._open)} connections are gone")

    def heal(self) -> None:
        return  # what is gone is gone; the peers connect anew

    def verify_healed(self) -> None:
        self.verify()


class HalfClose(Fault):
    """An early end of one direction of every open connection, the other going on; new ones are let through."""

    def __init__(self, proxy: Proxy, direction: Direction, *, aim: Direction | None = None) -> None:
        self._proxy, self._direction, self._aim = proxy, direction, aim or direction
        self._open: frozenset[int] = frozenset()

    def inject(self) -> None:
        self._open = self._proxy.connections()
        self._proxy.half_close(self._aim)

    def verify(self) -> None:
        if not self._open:
            raise FaultNotVerified(f"{self._proxy.address} had no connection to close half")
        must(
            lambda: not (self._open & self._proxy.connections()) - self._proxy.shut(self._direction),
            f"{len(self._open)} receivers {self._direction} have seen the end",
        )

    def heal(self) -> None:
        return  # an end cannot be taken back; the peers connect anew

    def verify_healed(self) -> None:
        self.verify()
