"""What every fault is: injected, proven to have taken hold, healed, proven gone; knows no particular fault."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self

POLL_S = 0.005


class FaultNotVerified(AssertionError):
    """The fault did not take hold, or did not go away: whatever was tested meanwhile proves nothing."""


class FaultUnavailable(Exception):
    """This machine lacks what the fault needs; the message names it."""


class Fault(ABC):
    """Entered, it injects and verifies; left, it heals and verifies that. Nothing is left broken when a step fails.

    Faults take an `aim`: where the blow really falls, by default the target. A control aims elsewhere, and must be
    refused by `verify`, which always looks at the target.
    """

    @abstractmethod
    def inject(self) -> None:
        """Break it."""

    @abstractmethod
    def verify(self) -> None:
        """Raise FaultNotVerified unless the target is broken as intended."""

    @abstractmethod
    def heal(self) -> None:
        """Undo; harmless when repeated or when nothing was injected."""

    @abstractmethod
    def verify_healed(self) -> None:
        """Raise FaultNotVerified unless the target works again (or, where nothing can heal it, is gone for good)."""

    def __enter__(self) -> Self:
        try:
            self.inject()
            self.verify()
        except BaseException:
            self.heal()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.heal()
        if error is None:
            self.verify_healed()


def must(condition: Callable[[], bool], claim: str | Callable[[], str], *, timeout_s: float = 10.0) -> None:
    """Poll until the condition holds; raise FaultNotVerified with the claim when it does not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise FaultNotVerified(f"not so after {timeout_s} s: {claim if isinstance(claim, str) else claim()}")
        time.sleep(POLL_S)
