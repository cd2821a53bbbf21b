"""A reading of something that may be slow or gone, taken when it is asked for; never more than one at a time.

Scrapes come from threads of the HTTP server and from anybody who can reach it. However many come, the source is read
by one thread, and a source that hangs costs that thread and a bounded wait.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from llama4_dist.errors import Llama4Error

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_S = 3.0  # below Prometheus's usual timeout of 10 s, for several sources


class _Reading(Generic[T]):
    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self.done = threading.Event()
        self.value: T | None = None


class Sampled(Generic[T]):
    """`read` returns a reading that was begun at most `fresh_s` ago or is under way; None where none comes in time.

    Nothing older is ever returned: what cannot be read now is not known.
    """

    def __init__(
        self,
        source: Callable[[], T],
        *,
        fresh_s: float = 0.0,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._fresh_s = fresh_s
        self._patience_s = patience_s
        self._clock = clock
        self._lock = threading.Lock()
        self._last: _Reading[T] | None = None
        self._success_s: float | None = None

    def read(self) -> T | None:
        """Return the value, waiting for it until the reading is `patience_s` old."""
        with self._lock:
            now_s, reading = self._clock(), self._last
            if reading is None or (reading.done.is_set() and now_s - reading.began_s >= self._fresh_s):
                reading = self._last = _Reading(now_s)
                threading.Thread(target=self._take, args=(reading,), name="sampled", daemon=True).start()
        reading.done.wait(max(0.0, reading.began_s + self._patience_s - self._clock()))
        return reading.value

    @property
    def age_s(self) -> float | None:
        """Seconds since the last reading that worked was begun; None if none has."""
        return None if self._success_s is None else self._clock() - self._success_s

    def _take(self, reading: _Reading[T]) -> None:
        try:
            reading.value = self._source()
            self._success_s = reading.began_s
        except Llama4Error as error:
            log.debug("reading_failed reason=%s", error.reason)
        except Exception:  # a defect in a reading must not end what is measured
            log.exception("reading_failed")
        finally:
            reading.done.set()
