"""Named places where an expert host can be told to die or to stand still, so that a test hits the moment it means.

Off unless armed; a host can be armed only when it was started for that. Decides nothing about when.
"""

import os
import signal
import threading

POINTS = ("idle", "receiving", "computing", "half_reply", "replied", "adopting")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class FaultPoints:
    """One armed point at a time: at its `after`-th passing this process gets the signal. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._point = ""
        self._left = 0
        self._signal = signal.SIGKILL

    def arm(self, point: str, *, after: int = 1, action: str = "kill") -> None:
        """Arm a point, or with "" none."""
        if point and point not in POINTS:
            raise ValueError(f"{point!r} is no fault point: choose one of {', '.join(POINTS)}")
        if action not in SIGNALS or after < 1:
            raise ValueError(f"{action=} {after=}: give kill or stop, and a passing from 1 on")
        with self._lock:
            self._point, self._left, self._signal = point, after, SIGNALS[action]

    def due(self, point: str) -> bool:
        """Pass a point; tell whether this is the passing that was armed."""
        if self._point != point:
            return False
        with self._lock:
            self._left -= 1
            if self._point != point or self._left > 0:
                return False
            self._point = ""
            return True

    def strike(self) -> None:
        """Get the signal; from SIGSTOP this returns when somebody sends SIGCONT."""
        os.kill(os.getpid(), self._signal)

    def hit(self, point: str) -> None:
        """Pass a point, and get the signal if it is due."""
        if self._point == point and self.due(point):
            self.strike()
