"""Processes the controller wants and those it has: written by the controller, carried out by whoever owns processes.

The owner asks for orders, spawns and ends, and says so here; it may ask as often as it likes. Knows no Ray.
"""

import threading
import time
from collections.abc import Callable, Collection

from cluster.handle import Handle
from cluster.worker import Role
from llama4_dist.errors import Llama4Error, UnavailableError

CHECK_INTERVAL_S = 0.1


class Provisioning:
    """Thread-safe book of wanted and unwanted processes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._wanted: dict[str, Role] = {}
        self._provided: dict[str, Handle] = {}
        self._refused: dict[str, Llama4Error] = {}
        self._unwanted: set[str] = set()

    def orders(self) -> tuple[dict[str, Role], tuple[str, ...]]:
        """Return (wanted, unwanted); the same again until it is answered."""
        with self._changed:
            return dict(self._wanted), tuple(sorted(self._unwanted))

    def provide(self, handle: Handle) -> None:
        """Hand over a process that was ordered."""
        with self._changed:
            if self._wanted.pop(handle.worker, None) is None:
                self._unwanted.add(handle.worker)  # nobody waits for it any more
            else:
                self._provided[handle.worker] = handle
            self._changed.notify_all()

    def refuse(self, worker: str, error: Llama4Error) -> None:
        """Say that a process cannot be had."""
        with self._changed:
            if self._wanted.pop(worker, None) is not None:
                self._refused[worker] = error
            self._changed.notify_all()

    def ended(self, worker: str) -> None:
        """Say that a process is gone."""
        with self._changed:
            self._unwanted.discard(worker)
            self._changed.notify_all()

    def obtain(
        self, workers: Collection[str], role: Role, *, timeout_s: float, check: Callable[[], None]
    ) -> list[Handle]:
        """Order processes and wait until all are there; on any failure none stays ordered, and those there go.

        `check` is called while waiting and may raise. UnavailableError when one cannot be had in time.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._wanted |= dict.fromkeys(workers, role)
            try:
                while not self._provided.keys() >= set(workers):
                    check()
                    if refused := [self._refused[worker] for worker in workers if worker in self._refused]:
                        raise refused[0]
                    if time.monotonic() >= deadline:
                        missing = sorted(set(workers) - self._provided.keys())
                        raise UnavailableError(
                            f"{', '.join(missing)} did not start in {timeout_s:.0f} s: is there room in the cluster?",
                            reason="INSUFFICIENT_CAPACITY",
                        )
                    self._changed.wait(CHECK_INTERVAL_S)
            except BaseException:
                self._unwanted |= self._provided.keys() & set(workers)
                raise
            finally:
                for worker in workers:
                    self._wanted.pop(worker, None)
                    self._refused.pop(worker, None)
                taken = [self._provided.pop(worker) for worker in workers if worker in self._provided]
        return taken

    def dismiss(self, workers: Collection[str], *, timeout_s: float) -> list[str]:
        """Order the end of processes and wait; return those that were not ended in time."""
        with self._changed:
            self._unwanted |= set(workers)
            self._changed.wait_for(lambda: not self._unwanted & set(workers), timeout_s)
            return sorted(self._unwanted & set(workers))
