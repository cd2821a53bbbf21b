"""The thread of a member process: computes parts as they come, and does other things only between two of them."""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

import torch

from llama4_dist.errors import UnavailableError

log = logging.getLogger(__name__)
T = TypeVar("T")

STUCK = "MEMBER_STUCK"


class MemberLoop:
    """One thread for the life of a process. It holds no lock while an action runs."""

    def __init__(self, name: str) -> None:
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, action: Callable[[], None]) -> None:
        """Have something done after all that was posted before."""
        self._inbox.put(action)

    def do(self, action: Callable[[], T], *, timeout_s: float) -> T:
        """Do something between two parts, and return its result or raise what it raised.

        Raises UnavailableError (MEMBER_STUCK) where the thread does not come to it in time: it may wait in a call that
        nothing wakes, and then only the end of the process helps.
        """
        done: Future[T] = Future()

        def act() -> None:
            if not done.set_running_or_notify_cancel():
                return  # nobody waits any more
            try:
                done.set_result(action())
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                done.set_exception(error)

        self._inbox.put(act)
        try:
            return done.result(timeout_s)
        except FutureTimeout:
            if done.done():
                raise  # the action's own
            done.cancel()
            raise UnavailableError(
                f"a member did not come to an end with its part in {timeout_s:g} s", reason=STUCK
            ) from None

    def close(self, *, timeout_s: float) -> None:
        """End the thread, if it comes to that in time."""
        self._inbox.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        with torch.inference_mode():
            while (action := self._inbox.get()) is not None:
                try:
                    action()
                except Exception:  # a defect here must not end the thread that all else waits for
                    log.exception("member_action_failed")
