"""One Ray actor as driver and controller see it, and whether the head of Ray answers. Starts no actor."""

import logging
import threading
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from cluster.worker import Role
from llama4_dist.errors import EngineError, Llama4Error, UnavailableError

log = logging.getLogger(__name__)

HEAD_TIMEOUT_S = 2.0


class Head:
    """The head of Ray, asked in a thread: a call to one that is gone waits for ever."""

    def __init__(self) -> None:
        self._asking: threading.Thread | None = None

    def answers(self, timeout_s: float) -> bool:
        """Tell whether it answers in time; one question is open at a time."""
        if self._asking is not None and self._asking.is_alive():
            timeout_s = 0.0  # it owes an answer already
        else:
            self._asking = threading.Thread(target=ray.nodes, daemon=True)
            self._asking.start()
        self._asking.join(timeout_s)
        return not self._asking.is_alive()


HEAD = Head()


class ActorHandle:
    """One actor as driver and controller see it. The driver's copy owns the actor, the controller's does not."""

    def __init__(self, worker: str, role: Role, actor: Any) -> None:
        self.worker = worker
        self.role = role
        self._actor = actor

    def call(self, method: str, *arguments: object) -> Future[Any]:
        """Call a method of the actor; the future fails with one of our errors."""
        answer: Future[Any] = Future()

        def copy(remote: Future[Any]) -> None:
            error = remote.exception()
            if error is None:
                answer.set_result(remote.result())
            else:
                answer.set_exception(self._translated(error))

        self._actor.call.remote(method, *arguments).future().add_done_callback(copy)
        return answer

    def kill(self) -> None:
        """End the process, whatever it is doing; where the head of Ray is gone, as soon as it listens."""
        if HEAD.answers(HEAD_TIMEOUT_S):
            ray.kill(self._actor, no_restart=True)
        else:
            self._actor.leave.remote()

    def _translated(self, error: BaseException) -> BaseException:
        if isinstance(error, RayTaskError):  # raised by the actor's own code
            cause = error.cause
            if isinstance(cause, Llama4Error | ValueError):
                return cause
            log.error("worker_failed worker=%s\n%s", self.worker, error)
            return EngineError(f"{self.worker} failed: {type(cause).__name__}; its log says why")
        if isinstance(error, RayError):
            log.warning("worker_lost worker=%s cause=%s", self.worker, cause_of(error))
            return UnavailableError(f"the process of {self.worker} died", reason="WORKER_LOST")
        return error


def cause_of(error: RayError) -> str:
    """Say in a line why an actor is gone: Ray's first line, or the last one, what its constructor raised."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if isinstance(error, ActorDiedError) and "creation task" in lines[0] else lines[0]
